"""The report of a real sweep over text full of markup, opened in a real browser, wide and narrow."""

import asyncio
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from tests.orchestrator.report.pages import ParsedPage
from tests.system.browser import CHROMIUM, Page, browser_page
from tests.system.test_first_sweep import Sweep

pytestmark = [pytest.mark.system, pytest.mark.slow]

WORDS = ("the", "state", "of", "our", "union", "is", "strong", "and", "so", "are", "its", "people")
MARKUP = "</script><script>window.hacked = 1</script> <img src=x onerror='hacked = 1'> <!-- &amp; ]]>"
MEGABYTES = 1_000_000


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Two trainings of layer 1 of SmolLM2 on pages of HTML."""
    sweep = Sweep.create(tmp_path_factory.mktemp("report") / "first")
    text = sweep.folder / "text"
    text.mkdir()
    for number in range(40):
        words = random.Random(number).choices(WORDS, k=300)
        for place in range(0, len(words), 10):
            words.insert(place, MARKUP)
        (text / f"{number:02d}.txt").write_text(" ".join(words))
    sweep.run("sweep", "first.yaml", f"corpus.name={text}", "corpus.validation_documents=0.3")
    return sweep


@pytest.fixture(scope="module")
def report(sweep: Sweep) -> Path:
    out, err = sweep.run("report", "first.yaml")
    assert "left out" not in err and "MLflow" not in err
    assert out.strip() == str(sweep.storage / "first" / "report.html")
    return Path(out.strip())


def test_mlflow_has_the_report_on_the_sweeps_run(sweep: Sweep, report: Path) -> None:
    client = MlflowClient(f"sqlite:///{sweep.storage / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("first")
    (parent,) = client.search_runs([experiment.experiment_id], "tags.`qk.sweep` != ''")
    sent = mlflow.artifacts.load_text(f"{parent.info.artifact_uri}/report.html")
    assert sent == report.read_text()


def test_a_report_is_one_file_of_the_ledgers_figures(sweep: Sweep, report: Path) -> None:
    assert report.stat().st_size < 8 * MEGABYTES
    page = ParsedPage(report.read_text())
    (study,) = json.loads(sweep.run("fronts", "first.yaml", "--json")[0])["fronts"]
    (front,) = page.data["figures"]["fronts"]["data"]
    assert front["x"] == [one["l0"] for one in study["trainings"]]
    assert front["y"] == [one["kl_recovered"] for one in study["trainings"]]
    texts = ["".join(sentence["tokens"]) for sentence in page.data["patterns"]["L01"]["sentences"]]
    assert len(texts) == 3 and all("union" in text or "script" in text for text in texts)
    assert any("</script><script>" in text for text in texts)
    assert len(page.scripts) == 3


@dataclass(frozen=True)
class Seen:
    """What the browser made of the page at one width."""

    width: int
    complaints: list[str]
    requests: list[str]
    facts: dict[str, Any]
    hovered: str
    stepped: str
    screenshot: bytes


FACTS = """({
    width: document.documentElement.scrollWidth,
    outside: [...document.querySelectorAll("body *")].filter((one) =>
        !one.closest(".scroll") && one.getBoundingClientRect().right > innerWidth + 1).length,
    drawn: document.querySelectorAll(".plot .main-svg").length > 0
        && [...document.querySelectorAll(".plot")].every((one) => one.querySelector(".main-svg")),
    heads: document.querySelectorAll(".head").length,
    hacked: typeof window.hacked,
    images: document.querySelectorAll("img").length,
    tokens: document.querySelector(".tokens").textContent,
})"""


async def look(report: Path, width: int, folder: Path) -> Seen:
    async with browser_page(folder / "profile") as page:
        await page.open(report, width)
        facts = await page.evaluate(FACTS)
        hovered = await hover(page)
        # the head that has the focus is moved over by the arrow keys
        await page.evaluate("document.querySelectorAll('.head')[2].focus()")
        for key in ("ArrowUp", "ArrowRight", "ArrowRight"):
            await page.press(key)
        stepped = await page.evaluate("document.querySelector('output').textContent")
        await page.screenshot(folder / "page.png")
        return Seen(width, page.complaints, page.requests, facts, hovered, stepped, (folder / "page.png").read_bytes())


async def hover(page: Page) -> str:
    """What is read out with the mouse in the lowest row and first column of the first head's reconstruction."""
    place = """(() => { const canvas = document.querySelectorAll(".head canvas")[1];
        canvas.scrollIntoView({ block: "center", behavior: "instant" });
        const box = canvas.getBoundingClientRect(); return [box.left + 1, box.bottom - 1]; })()"""
    await page.point(*await page.evaluate(place))
    return await page.evaluate("document.querySelector('output').textContent")


@pytest.fixture(scope="module", params=[1280, 400])
def seen(request: pytest.FixtureRequest, report: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    if not CHROMIUM.is_file():
        pytest.skip(f"{CHROMIUM} is not there: apt-get install chromium")
    return asyncio.run(look(report, request.param, tmp_path_factory.mktemp("browser")))


def test_a_browser_has_nothing_to_complain_about(seen: Seen, report: Path) -> None:
    assert seen.complaints == []
    assert {one for one in seen.requests if not one.startswith("data:")} == {report.as_uri()}
    assert (seen.facts["hacked"], seen.facts["images"]) == ("undefined", 0)
    assert seen.screenshot.startswith(b"\x89PNG") and len(seen.screenshot) > 50_000


def test_everything_is_drawn_and_nothing_wider_than_the_window(seen: Seen) -> None:
    assert seen.facts["drawn"] and seen.facts["heads"] == 9
    assert seen.facts["width"] <= seen.width and seen.facts["outside"] == 0


def test_pointing_and_arrow_keys_read_values_out(seen: Seen, report: Path) -> None:
    sentence = ParsedPage(report.read_text()).data["patterns"]["L01"]["sentences"][0]["tokens"]
    assert seen.facts["tokens"] == "".join(sentence)
    last = len(sentence) - 1
    assert seen.hovered.startswith(f"head 0, query {last} “{sentence[last]}” → key 0 “<|endoftext|>”: p ")
    assert seen.stepped.startswith(f"head 2, query {last - 1} “{sentence[last - 1]}” → key 2 “{sentence[2]}”: p ")
    p, reconstructed = (float(value.split()[-1]) for value in seen.hovered.split(": p ")[1].split(", "))
    assert 0 <= p <= 1 and 0 <= reconstructed <= 1
