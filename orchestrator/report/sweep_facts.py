"""What a report shows of the ledger: fronts, what they cost, and the training that each study is examined by."""

from dataclasses import dataclass

from orchestrator.choice import KneeRule, find_finished
from orchestrator.ledger import Ledger
from orchestrator.ledger_records import SweepRecord, Training
from orchestrator.status import StudyStatus, hypervolumes_by_tokens, study_statuses
from orchestrator.study_names import study_names


@dataclass(frozen=True)
class StudyFacts:
    """One study and the training that stands for it.

    `name` is fit for an address within the page. `progress` are (tokens, hypervolume) after each training that
    finished, the tokens being those of all the study's trainings that had ended by then. `chosen` is None where
    nothing is on the front.
    """

    name: str
    status: StudyStatus
    progress: list[tuple[int, float]]
    chosen: Training | None
    is_knee: bool

    @property
    def finished(self) -> list[Training]:
        return [one for one in self.status.trainings if one.state == "finished"]

    @property
    def title(self) -> str:
        return self.status.title


@dataclass(frozen=True)
class SweepFacts:
    """A sweep and its studies, by layer."""

    sweep: SweepRecord
    studies: list[StudyFacts]


def gather_sweep(ledger: Ledger, training_id: str | None) -> SweepFacts:
    """Reads the ledger. `training_id`, or what it begins with, stands for its study in place of the front's knee.

    Raises InputError when no finished training has that id, and when several have.
    """
    statuses = study_statuses(ledger)
    asked = None if training_id is None else find_finished(statuses, training_id, "--training")[1]
    names = study_names([status.study for status in statuses])
    studies = []
    for status in statuses:
        is_asked = asked is not None and asked.study_id == status.study.study_id
        chosen = asked if is_asked else KneeRule().pick(status.front)
        name = names[status.study.study_id]
        studies.append(
            StudyFacts(
                name,
                status,
                [(point.tokens, point.value) for point in hypervolumes_by_tokens(status)],
                chosen,
                is_knee=not is_asked,
            )
        )
    return SweepFacts(ledger.sweep(), studies)
