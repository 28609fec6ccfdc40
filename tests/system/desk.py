"""Submitting as a person does it: a folder with a sweep file and one cluster, and `orchestrate` run in it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml

from orchestrator.ledger import Ledger
from orchestrator.ledger_file import LEDGER_FILE
from tests.system.test_first_sweep import FILE

PATIENCE = 300


class Desk:
    """A folder from which a person submits, with one cluster in it; storage is shared by all that it submits."""

    def __init__(self, folder: Path, cluster: dict[str, object], environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = os.environ | environment
        (folder / "clusters").mkdir()
        (folder / "clusters" / "mine.yaml").write_text(yaml.safe_dump(cluster))
        (folder / "first.yaml").write_text(yaml.safe_dump(FILE | {"storage": str(folder / "store")}))

    def ask(self, *arguments: str, code: int = 0) -> tuple[str, str]:
        """(stdout, stderr) of `orchestrate …`."""
        ran = subprocess.run(
            [sys.executable, "-m", "orchestrator", *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert ran.returncode == code, ran.stdout + ran.stderr
        return ran.stdout, ran.stderr

    def submit(self, *overrides: str) -> str:
        out, _ = self.ask("submit", "first.yaml", *overrides, "--cluster", "mine", "--json")
        return json.loads(out)["job"]

    def state(self, job: str) -> str:
        listed = json.loads(self.ask("jobs", "--json")[0])
        return next(one["state"] for one in listed if one["job"] == job)

    def wait(self, job: str, *states: str, patience: float = PATIENCE, every: float = 1) -> str:
        """The state that it is in then; asked for `every` so many seconds, at a second of CPU each."""
        deadline = time.monotonic() + patience
        while (state := self.state(job)) not in states:
            assert time.monotonic() < deadline, f"{job} is {state}\n{self.ask('logs', job)[0]}"
            time.sleep(every)
        return state

    def wait_for_reports(self, name: str, tokens: int) -> None:
        """Until a training of the sweep has got that far."""
        path, deadline = self.folder / "store" / name / LEDGER_FILE, time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if (ledger := Ledger.open_if_there(path)) is not None:
                if any(training.tokens_done >= tokens for training in ledger.trainings()):
                    return
                ledger.close()
            time.sleep(0.3)
        raise TimeoutError(f"{name}: no training has {tokens} tokens")

    def tokens(self, name: str) -> int:
        """What the sweep's trainings have seen together."""
        ledger = Ledger.open_existing(self.folder / "store" / name / LEDGER_FILE)
        return sum(training.tokens_done for training in ledger.trainings())

    def hashes(self, name: str) -> dict[str, str | None]:
        ledger = Ledger.open_existing(self.folder / "store" / name / LEDGER_FILE)
        return {training.label: training.dictionary_sha256 for training in ledger.trainings()}
