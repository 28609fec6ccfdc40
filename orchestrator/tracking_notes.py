"""What the ledger notes of what has arrived in MLflow, and what is owed by these notes."""

from dataclasses import dataclass
from typing import Literal

from orchestrator.ledger import Ledger
from orchestrator.ledger_tables import State, Training

RUN_STATUS: dict[State, str] = {
    "open": "SCHEDULED",
    "running": "RUNNING",
    "finished": "FINISHED",
    # MLflow has no word for it; the tag `state` does
    "stopped": "KILLED",
    "failed": "FAILED",
}
EndStatus = Literal["FINISHED", "KILLED"]
# items of a training's run
TRAINING, STATUS, REPORTS = "training", "status", "reports"


@dataclass(frozen=True)
class Owed:
    """Trainings of which MLflow lacks the latest state or reports, and how many reports those are."""

    trainings: int
    reports: int


def status_mark(training: Training) -> str:
    """What is noted of a run once a training's present state has arrived there."""
    return f"{RUN_STATUS[training.state]} {training.attempts}"


def has_run(training: Training) -> bool:
    """Whether MLflow is to know of a training: from its first start on."""
    return training.attempts > 0 or training.state != "open"


def end_status(ledger: Ledger) -> EndStatus:
    """How the parent run ends when nobody is at work: FINISHED once nothing that was begun is left to be continued."""
    current = {study.study_id for study in ledger.studies() if study.is_current}
    is_left = any(one.state in ("open", "running") and one.study_id in current for one in ledger.trainings())
    return "KILLED" if is_left else "FINISHED"


def owed(ledger: Ledger) -> Owed:
    """What MLflow lacks, as far as this ledger was told: a store that was emptied since is noticed at a delivery."""
    notes: dict[str, dict[str, str]] = {}
    for note in ledger.delivered().values():
        if TRAINING in note:
            notes[note[TRAINING]] = note
    trainings, reports = 0, 0
    for training in filter(has_run, ledger.trainings()):
        note = notes.get(training.training_id, {})
        status = note.get(STATUS, "")
        # what has finished reports no more, even where it is trained again
        if status.startswith(RUN_STATUS["finished"]):
            continue
        missing = ledger.count_reports(training.training_id, after=int(note.get(REPORTS, 0)))
        trainings += missing > 0 or status != status_mark(training)
        reports += missing
    return Owed(trainings, reports)
