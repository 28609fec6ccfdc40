"""What a person is told while trainings run."""

from pathlib import Path

import pytest

from orchestrator.config import load_sweep
from orchestrator.ledger import Ledger
from orchestrator.plan import make_plan
from orchestrator.terminal import LiveProgress
from tests.orchestrator.sweep_files import write_sweep

POINT = {"dictionary_size": 128, "activation": "topk", "k": 8, "learning_rate": 6e-3, "seed": 0}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [1000.0]
    monkeypatch.setattr("orchestrator.terminal.time.monotonic", lambda: clock[0])
    return clock


@pytest.fixture
def progress(tmp_path: Path, ledger: Ledger, clock: list[float]) -> LiveProgress:
    plan = make_plan(load_sweep(write_sweep(tmp_path), ["layers=[1]"]))
    ledger.open_study(plan.studies[0].study_id, "transcoder", 1, {}, model="m", corpus="c")
    ledger.add_training(plan.studies[0].study_id, "one", POINT, 4096)
    return LiveProgress(plan, ledger)


def test_speed_is_that_of_the_last_minutes(ledger: Ledger, clock: list[float], progress: LiveProgress) -> None:
    assert progress.rate() == "measuring speed"
    said = []
    # a slow quarter of an hour, then a fast minute
    for clock[0], tokens in [(1100.0, 100), (1800.0, 800), (1900.0, 900), (1930.0, 1500), (1960.0, 2100)]:
        ledger.report("one", tokens, {}, seconds=1.0)
        said.append(progress.rate())
    assert said[0] == "100 of 16,384 training-tokens, 1/s, about 4 h 31 min left"
    # 1,300 in the 160 s since the first change of the last five minutes
    assert "8/s, " in said[-1] and "2,100 of" in said[-1], said


def test_the_time_left_falls_between_reports_and_rises_when_one_is_overdue(
    ledger: Ledger, clock: list[float], progress: LiveProgress
) -> None:
    said = []
    for tokens in (1000, 2000):
        clock[0] += 100
        ledger.report("one", tokens, {}, seconds=1.0)
        progress.rate()
    for _ in range(5):
        clock[0] += 50
        said.append(progress.rate().partition("training-tokens, ")[2])
    # 14,384 at 10/s, of which 100 s are the next report's
    assert said[:2] == ["10/s, about 23 min 08 s left", "10/s, about 22 min 18 s left"]
    # the last five minutes saw 1,000 in 250 s, and the wait
    assert said[-1] == "4/s, about 58 min 16 s left"
