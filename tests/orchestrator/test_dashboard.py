"""What optuna-dashboard gets to see."""

import json
import subprocess
import time
import urllib.request
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from orchestrator.dashboard import dashboard_command, export_studies
from orchestrator.ledger import Ledger
from tests.system.services import free_port

KL_L0 = {"one": (0.1, 16.0), "two": (0.2, 8.0)}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.open_sweep("l1", {}, None, {})
    ledger.open_study("study", "transcoder", 8, {}, model="m", corpus="c")
    shared = {"dictionary_size": 512, "activation": "topk", "seed": 0}
    for name, k, rate in (("one", 16, 1e-3), ("two", 8, 3e-2), ("lost", 4, 1e-3), ("waiting", 2, 1e-3)):
        ledger.add_training("study", name, shared | {"k": k, "learning_rate": rate}, 1000)
    for name, (kl, l0) in KL_L0.items():
        ledger.start(name, "pack-0001", {})
        ledger.finish(name, {"kl": kl, "l0": l0, "kl_recovered": 0.9}, f"dictionaries/{name}", "aa" * 32)
    ledger.fail("lost", "diverged")
    return ledger


def test_ended_trainings_become_trials_with_what_differs_between_them(ledger: Ledger) -> None:
    for _ in range(2):
        # a second export takes the place of the first
        study = optuna.load_study(study_name="l1 L08", storage=export_studies(ledger))
    trials = {trial.user_attrs["training_id"]: trial for trial in study.trials}
    assert {name: tuple(trial.values) for name, trial in trials.items() if trial.values} == KL_L0
    assert (len(trials), trials["lost"].state) == (3, TrialState.FAIL)
    assert trials["two"].params == {"k": 8, "learning_rate": 3e-2}
    assert trials["two"].distributions["learning_rate"].log
    assert study.metric_names == ["kl", "l0"]


def test_the_dashboard_serves_the_export(ledger: Ledger) -> None:
    port = free_port()
    process = subprocess.Popen(dashboard_command(export_studies(ledger), port), stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=10) as answer:
                    (summary,) = json.load(answer)["study_summaries"]
                break
            except OSError:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.3)
        assert summary["study_name"] == "l1 L08"
    finally:
        process.kill()
        process.wait()
