"""A person's path through the pages of the real MLflow UI, from the list of experiments to an alias in the registry."""

import asyncio
from pathlib import Path

import pytest

from orchestrator.ledger import Training
from orchestrator.pareto import front_trainings
from tests.system.browser import CHROMIUM, browser_page
from tests.system.mlflow_pages import MlflowPages
from tests.system.services import mlflow_ui
from tests.system.test_first_sweep import Sweep

pytestmark = [
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.is_file(), reason=f"{CHROMIUM} is not there: apt-get install chromium"),
]

MODEL = "qk.smollm2-135m.L01"
GRID = ("search.space.k=[4,16]", "search.trainings=4")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    sweep = Sweep.create(tmp_path_factory.mktemp("pages") / "sweep")
    sweep.run("sweep", "first.yaml", *GRID)
    sweep.run("choose", "first.yaml")
    return sweep


def test_from_the_experiment_to_the_front_to_the_alias(sweep: Sweep, tmp_path: Path) -> None:
    front = front_trainings(sweep.trainings())
    assert 2 <= len(front) < len(sweep.trainings()) == 4
    with mlflow_ui("first.yaml", sweep.folder) as address:
        asyncio.run(walk(address, front, tmp_path / "profile"))


async def walk(address: str, front: list[Training], profile: Path) -> None:
    labels = [training.label for training in front]
    async with browser_page(profile) as page:
        pages = MlflowPages(page, address)
        await pages.enter()
        await pages.open_experiment("first")
        await pages.wait_for_runs(["first"])

        await pages.open_run("first")
        await page.wait_for_text("Description", f"{len(front)} on the front", "hypervolume_L01", *labels)
        await pages.open_artifact("fronts/L01.png")
        await page.wait_for("[...document.images].some((one) => one.naturalWidth >= 1000)")

        await page.click_text("Runs")
        await pages.search("tags.pareto = 'true'")
        await pages.sort_by("l0")
        await pages.wait_for_runs(labels)

        await pages.compare_all()
        await page.wait_for_text(f"Comparing {len(front)} Runs from 1 Experiment", *labels)
        await page.click_text("Scatter Plot")
        await pages.choose_axes(x="l0", y="kl")

        await pages.open_registry()
        await page.wait_for_text(MODEL, "@ knee")
        await pages.open_model(MODEL)
        await page.wait_for_text("Version 1", "@ knee")
        await page.click_text("Version 1")
        await page.wait_for_text("Source Run", "@ knee")
        text = await page.text()
        assert any(label in text for label in labels)


def test_the_parent_run_links_to_its_front(sweep: Sweep, tmp_path: Path) -> None:
    front = front_trainings(sweep.trainings())
    with mlflow_ui("first.yaml", sweep.folder) as address:
        asyncio.run(follow_link(address, front, tmp_path / "profile"))


async def follow_link(address: str, front: list[Training], profile: Path) -> None:
    async with browser_page(profile) as page:
        pages = MlflowPages(page, address)
        await pages.enter()
        await pages.open_experiment("first")
        await pages.open_run("first")
        text = f"{len(front)} on the front"
        await page.wait_for_text(text)
        found = f"[...document.querySelectorAll('a')].find((one) => one.innerText == '{text}')"
        # it would open another tab
        await page.evaluate(f"{found}.removeAttribute('target')")
        await page.click(found)
        await page.wait_for_text("Sort: l0", f"{len(front)} matching runs")
        await pages.wait_for_runs([training.label for training in front])
