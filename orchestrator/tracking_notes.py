"""What the ledger notes of what has arrived in MLflow, and what is owed by these notes."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.ledger import Ledger
from orchestrator.ledger_records import State, Training
from orchestrator.report import REPORT_FILE
from orchestrator.starts import is_ended
from orchestrator.versions import GIT_DIFF_FILE

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
# of the parent's run, once all there is has arrived
COMPLETE = "complete"


@dataclass(frozen=True)
class Owed:
    """Trainings of which MLflow lacks the latest state or reports, and how many reports those are.

    `anything` says whether it lacks anything at all: fronts, dictionaries and the parent run's state included.
    """

    trainings: int
    reports: int
    anything: bool


def status_mark(training: Training) -> str:
    """What is noted of a run once a training's present state has arrived there."""
    return f"{RUN_STATUS[training.state]} {training.attempts} {training.dictionary_sha256 or ''}"


def results_mark(finished: Sequence[Training]) -> str:
    """Differs as soon as others have finished, one of them anew, or their study has other constraints."""
    return _digest([(one.training_id, one.dictionary_sha256, one.constraints) for one in finished])


def file_mark(path: Path) -> str:
    """Differs once a file was written anew; empty while there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"


def complete_mark(ledger: Ledger, trainings: Sequence[Training], status: str) -> str:
    """What is noted once all that stands in the ledger and beside it has arrived, and `status` on the parent's run."""
    return _digest(
        [
            status,
            asdict(ledger.sweep()),
            [asdict(study) for study in ledger.studies()],
            [(training.training_id, status_mark(training)) for training in trainings if has_run(training)],
            ledger.last_report(),
            [file_mark(ledger.folder / name) for name in (GIT_DIFF_FILE, REPORT_FILE)],
        ]
    )


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def has_run(training: Training) -> bool:
    """Whether MLflow is to know of a training: from its first start on."""
    return training.attempts > 0 or training.state != "open"


def has_ended_there(training: Training, notes: Mapping[str, str]) -> bool:
    """Whether all reports and the state of a training that has ended are noted, as of most of a large sweep."""
    return training.state in ("finished", "stopped", "failed") and notes.get(STATUS) == status_mark(training)


def end_status(ledger: Ledger) -> EndStatus:
    """How the parent run ends when nobody is at work: FINISHED once nothing that was begun is left to be continued."""
    current = {study.study_id for study in ledger.studies() if study.is_current}
    is_left = any(one.state in ("open", "running") and one.study_id in current for one in ledger.trainings())
    return "KILLED" if is_left else "FINISHED"


def owed(ledger: Ledger) -> Owed:
    """What MLflow lacks, as far as this ledger was told: a store that was emptied since is noticed at a delivery."""
    all_notes = ledger.delivered().values()
    notes = {note[TRAINING]: note for note in all_notes if TRAINING in note}
    all_trainings = ledger.trainings()
    trainings, reports = 0, 0
    for training in filter(has_run, all_trainings):
        note = notes.get(training.training_id, {})
        if has_ended_there(training, note):
            continue
        missing = ledger.count_reports(training.training_id, after=int(note.get(REPORTS, 0)))
        trainings += missing > 0 or note.get(STATUS) != status_mark(training)
        reports += missing
    if not ledger.folder.is_dir():
        # on another machine: nobody here knows what lies in it
        return Owed(trainings, reports, anything=trainings > 0)
    # while a driver is at work the parent runs
    statuses = [end_status(ledger)] if is_ended(ledger) else [end_status(ledger), "RUNNING"]
    expected = {complete_mark(ledger, all_trainings, status) for status in statuses}
    return Owed(trainings, reports, anything=not any(note.get(COMPLETE) in expected for note in all_notes))
