"""A person's steps through the pages of MLflow's UI. Each ends when what it leads to can be read."""

import asyncio
import json
import time
from pathlib import Path

from tests.system.browser import SECONDS, Page


class MlflowPages:
    """MLflow's UI at `address` in a tab, as somebody uses it who wants to see sweeps."""

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self._address = address

    async def enter(self, width: int = 1440, height: int = 900) -> None:
        """The list of experiments, from the first page that a new browser gets."""
        await self.page.resize(width, height)
        await self.page.visit(self._address)
        # MLflow opens with pages for users of language models, and remembers what was chosen
        await self.page.click_text("Model training")
        await self.page.click("document.querySelector('button[aria-label=Close]')")
        await self.page.click_text("Experiments")
        await self.page.wait_for_text("Last modified", "Default")

    async def open_experiment(self, name: str) -> None:
        """Its runs: sweeps, with their trainings folded away."""
        await self.page.click_text(name, "[data-testid=experiment-list-item-link], td a, [role=cell] a")
        await self._wait_for_list(name)

    async def search(self, condition: str) -> None:
        """Only runs that meet it."""
        before = await self._matching()
        await self.page.click("document.querySelector('[data-testid=search-box]')")
        await self.page.evaluate("document.activeElement.select()")
        await self.page.type(condition)
        await self.page.wait_for(f"document.querySelector('[data-testid=search-box]').value == {json.dumps(condition)}")
        # closes what the box proposes
        await self.page.press("Escape")
        await self.page.press("Enter")
        await self.page.wait_for("location.hash.includes('searchFilter=tags')")
        await self.page.wait_for(f"!document.body.innerText.includes({json.dumps(before)})")

    async def sort_by(self, name: str) -> None:
        """By a metric, ascending; the list is flat then."""
        await self.page.click("document.querySelector('[data-testid=sort-select-dropdown]')")
        await self.page.click(f"document.querySelector('[data-testid=\"sort-select-{name}\"]')")
        await self.page.wait_for(f"!!document.querySelector('[aria-label=\"Sort: {name}\"]')")
        await self.page.click("document.querySelector('[data-testid=sort-select-dropdown]')")
        await self.page.click("document.querySelector('[data-testid=sort-select-asc]')")
        await self.page.wait_for("location.hash.includes('orderByAsc=true')")
        await self.page.press("Escape")

    async def switch_columns(self, *names: str) -> None:
        """Those that were not shown are shown, the others no more."""
        await self.page.click_text("Columns")
        for name in names:
            entry = f"document.querySelector('[class*=tree-list] [title=\"{name}\"]')"
            is_shown = f"{entry}.closest('[class*=treenode]').className.includes('checkbox-checked')"
            before = await self.page.wait_for(f"{entry} && String({is_shown})")
            await self.page.click(entry)
            await self.page.wait_for(f"{is_shown} != {before}")
        await self.page.press("Escape")

    async def runs(self) -> list[str]:
        """Names in the list of runs, from top to bottom."""
        rows = "[...document.querySelectorAll('.ag-pinned-left-cols-container .ag-row')]"
        top = "(a, b) => a.getBoundingClientRect().top - b.getBoundingClientRect().top"
        return await self.page.evaluate(f"{rows}.sort({top}).map((one) => one.querySelector('a')?.innerText)")

    async def wait_for_runs(self, names: list[str]) -> None:
        """Until the list has these, from top to bottom."""
        deadline = time.monotonic() + SECONDS
        while (found := await self.runs()) != names:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the list has {found}, not {names}")
            await asyncio.sleep(0.1)

    async def choose_axes(self, **names: str) -> None:
        """`x`, `y` and `z` of a chart of compared runs."""
        for axis, name in names.items():
            selector = f"document.querySelector('#{axis}-axis-selector, #{axis}axis-selector')"
            await self.page.click(selector)
            await self.page.click_text(name, "[role=option]")
            await self.page.wait_for(f"{selector}.innerText == {json.dumps(name)}")

    async def choose_metrics(self, *names: str) -> None:
        """Of the parallel coordinates, in place of the one that MLflow chose."""
        field = "[...document.querySelectorAll('[class*=select-multiple]')].at(-1)"
        await self.page.click(f"{field}.querySelector('[class*=item-remove]')")
        for name in names:
            await self.page.click(f"{field}.querySelector('input')")
            await self.page.type(name)
            await self.page.click(f"document.querySelector('[class*=select-item-option][title=\"{name}\"]')")
        await self.page.evaluate("document.activeElement.blur()")
        await self.page.wait_for("!document.querySelector('[class*=select-dropdown]:not([class*=hidden])')")

    async def compare_all(self) -> None:
        """All runs of the list beside each other."""
        await self.page.click("document.querySelector('[aria-label=\"Select all runs\"]')")
        await self.page.click_text("Compare")
        await self.page.wait_for_text("Comparing", "Parallel Coordinates Plot", "Run details")
        await self.page.wait_for("!!document.querySelector('.js-plotly-plot .parcoords')")

    async def open_run(self, name: str) -> None:
        """From a list of runs."""
        await self.page.click_text(name, ".ag-row a")
        await self.page.wait_for_text("About this run", "Run ID")

    async def open_artifact(self, path: str) -> None:
        """Of the run that is open: its folders are opened one after the other, then the file."""
        await self.page.click_text("Artifacts", "[role=tab], a")
        for name in path.split("/"):
            await self.page.click(
                f"[...document.querySelectorAll('li *')].filter((one) => one.textContent.trim() == {json.dumps(name)})"
                ".at(-1)"
            )
        await self.page.wait_for_text(f"/artifacts/{path}")

    async def open_registry(self) -> None:
        """The list of registered dictionaries."""
        await self.page.click_text("Model registry")
        await self.page.wait_for_text("Registered Models", "Aliased versions")
        # what MLflow says to every new browser
        await self.page.click_text("Try it now")
        await self.page.wait_for("!document.body.innerText.includes('Try it now')")

    async def open_model(self, name: str) -> None:
        """From the registry: the versions of one."""
        await self.page.click_text(name, "a")
        await self.page.wait_for_text("Versions", "Registered at", "Aliases")

    async def picture(self, path: Path, seconds: float = 1) -> None:
        """Of the window once nothing in it has moved for some seconds, without what follows the mouse."""
        await self.page.point(2, 2)
        before = b""
        while True:
            await self.page.screenshot(path, whole=False)
            if path.read_bytes() == before:
                return
            before = path.read_bytes()
            await asyncio.sleep(seconds)

    async def _matching(self) -> str:
        return await self.page.wait_for("(document.body.innerText.match(/\\d+\\s+matching runs?/) || [])[0]")

    async def _wait_for_list(self, experiment: str) -> None:
        await self.page.wait_for_text("Run Name", experiment)
        await self._matching()
