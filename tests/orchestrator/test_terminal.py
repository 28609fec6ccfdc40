"""What a person is told while trainings run."""

import re
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
    clock[0] += 100
    ledger.report("one", 100, {}, seconds=1.0)
    assert progress.rate() == "100 of 16,384 training-tokens, 1/s, about 4 h 31 min left"
    tokens = 100
    # a slow quarter of an hour, then five fast minutes
    for seconds, gained in [(30, 30)] * 30 + [(30, 600)] * 10:
        clock[0] += seconds
        tokens += gained
        ledger.report("one", tokens, {}, seconds=1.0)
        said = progress.rate()
    assert said == "7,000 of 16,384 training-tokens, 18/s, about 8 min 34 s left"


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
    # 2,000 in the 200 s before, and the 150 s that it is late
    assert said[-1] == "6/s, about 40 min 17 s left"


def test_final_metrics_are_no_time_of_nothing(ledger: Ledger, clock: list[float], progress: LiveProgress) -> None:
    for later, tokens in ((100, 16_000), (50, 16_000)):
        clock[0] += later
        ledger.report("one", tokens, {}, seconds=1.0)
        said = progress.rate()
    assert said == "16,000 of 16,384 training-tokens, 160/s, the next report is due"
    ledger.report("one", 16_384, {}, seconds=1.0)
    assert progress.rate() == "16,384 of 16,384 training-tokens, 109/s"


def test_packs_that_report_soon_after_each_other_and_then_not_for_long(
    ledger: Ledger, clock: list[float], progress: LiveProgress
) -> None:
    study = ledger.trainings()[0].study_id
    ledger.add_training(study, "two", POINT | {"k": 16}, 4096)
    left = []
    # ten tokens in 400 s each, or one in 20
    for moment in range(5, 9000, 5):
        clock[0] = 1000.0 + moment
        for identifier, begun in (("one", 0), ("two", 10)):
            if moment > begun and (moment - begun) % 400 == 0:
                ledger.report(identifier, (moment - begun) // 40, {}, seconds=1.0)
        said = progress.rate()
        # a training's worth of reports
        if moment > 8 * 400:
            left.append((minutes(said), (20 * 16_384 - moment) / 60))
    assert all(0.8 < told / true < 1.25 for told, true in left)


def minutes(said: str) -> float:
    hours, minutes = re.search(r"about (?:(\d+) h )?(\d+) min", said).groups()
    return 60 * int(hours or 0) + int(minutes)
