"""Takes the pictures of docs/mlflow.md anew, from MLflow's UI on a sweep of sweeps/l1.yaml, in headless Chromium.

    make sweep
    python docs/mlflow_pictures.py [runs/l1]

Chooses the dictionaries that the pictures of the registry show, and writes docs/images/mlflow-*.png.
"""

import argparse
import asyncio
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.system.browser import browser_page
from tests.system.mlflow_pages import MlflowPages
from tests.system.services import mlflow_ui

IMAGES = Path(__file__).parent / "images"
LAYER = "tags.layer = '8'"
FRONT = f"tags.pareto = 'true' and {LAYER}"
EMPTY_COLUMNS = ("Dataset", "Source")
# the list shows what it is sorted by, l0, by itself
COLUMNS = ("kl", "kl_recovered", "dictionary_size", "sparsity_coefficient")
MODEL = "qk.smollm2-135m.L08"
RULES = ("knee", "l0=24")


class Album:
    """Pictures of the pages, by name."""

    def __init__(self, pages: MlflowPages) -> None:
        self._pages = pages

    async def add(self, name: str, height: int = 620, seconds: float = 1) -> None:
        """The window, of that many CSS pixels, once it was still for some seconds, in 256 colours."""
        path = IMAGES / f"mlflow-{name}.png"
        await self._pages.page.resize(1440, height)
        await self._pages.picture(path, seconds)
        Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
        print(path)


async def take(address: str, profile: Path) -> None:
    async with browser_page(profile) as page:
        pages = MlflowPages(page, address)
        album = Album(pages)
        await pages.enter()
        await album.add("experiments", 360)
        await pages.open_experiment("l1")

        await pages.open_run("l1")
        await page.click_text("Show more")
        await page.wait_for_text("Show less")
        await album.add("parent", 760)
        await pages.open_artifact("fronts/L08.html")
        await page.wait_for("!!document.querySelector('iframe')")
        # whose scripts run on their own
        await album.add("front", 760, seconds=8)

        await page.click_text("Runs")
        await pages.search(FRONT)
        await pages.sort_by("l0")
        await pages.switch_columns(*EMPTY_COLUMNS, *COLUMNS)
        await album.add("children", 500)
        await pages.search(LAYER)
        await compare(pages, album)
        await registry(pages, album)


async def compare(pages: MlflowPages, album: Album) -> None:
    page = pages.page
    await pages.compare_all()
    await pages.choose_metrics("l0", "kl_recovered")
    await album.add("parallel-coordinates", 760)
    await page.click_text("Scatter Plot")
    await pages.choose_axes(x="l0", y="kl")
    await album.add("scatter", 760)
    await page.click_text("Contour Plot")
    await pages.choose_axes(x="sparsity_coefficient", y="l0", z="kl")
    await album.add("contour", 760)


async def registry(pages: MlflowPages, album: Album) -> None:
    page = pages.page
    await pages.open_registry()
    await album.add("registry", 360)
    await pages.open_model(MODEL)
    await album.add("versions", 840)
    await page.click_text("Version 1")
    await page.wait_for_text("Source Run")
    await album.add("version", 480)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", nargs="?", default="runs/l1", help="folder of a sweep of sweeps/l1.yaml")
    sweep = parser.parse_args().sweep
    for rule in RULES:
        subprocess.run([sys.executable, "-m", "orchestrator", "choose", sweep, "--rule", rule], check=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, mlflow_ui(sweep, Path.cwd()) as address:
        asyncio.run(take(address, Path(folder) / "profile"))


if __name__ == "__main__":
    main()
