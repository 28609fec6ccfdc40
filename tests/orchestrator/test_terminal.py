"""What a person is told while trainings run."""

from pathlib import Path

import pytest

from orchestrator.config import load_sweep
from orchestrator.ledger import Ledger
from orchestrator.plan import make_plan
from orchestrator.terminal import LiveProgress
from tests.orchestrator.sweep_files import write_sweep

POINT = {"dictionary_size": 128, "activation": "topk", "k": 8, "learning_rate": 6e-3, "seed": 0}


def test_speed_is_that_of_the_last_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(load_sweep(write_sweep(tmp_path), ["layers=[1]"]))
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.open_study(plan.studies[0].study_id, "transcoder", 1, {}, model="m", corpus="c")
    ledger.add_training(plan.studies[0].study_id, "one", POINT, 4096)
    clock = [1000.0]
    monkeypatch.setattr("orchestrator.terminal.time.monotonic", lambda: clock[0])
    progress = LiveProgress(plan, ledger)
    assert progress.rate() == "measuring speed"
    said = []
    # a slow quarter of an hour, then a fast minute
    for clock[0], tokens in [(1100.0, 100), (1800.0, 800), (1900.0, 900), (1930.0, 1500), (1960.0, 2100)]:
        ledger.report("one", tokens, {}, seconds=1.0)
        said.append(progress.rate())
    assert said[0] == "100 of 16,384 training-tokens, 1/s, about 4 h 31 min left"
    # 1,300 in the 160 s since the first change of the last five minutes
    assert "8/s, " in said[-1] and "2,100 of" in said[-1], said
