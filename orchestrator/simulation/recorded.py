"""What a finished sweep recorded of its trainings, as material for replays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.ledger import Ledger, Training
from orchestrator.search.config import SearchConfig
from orchestrator.search.space import canonical, contains
from qkmodel.errors import InputError

Metrics = Mapping[str, float | None]


@dataclass(frozen=True)
class RecordedTraining:
    """A finished training and what it reported on the way, by tokens."""

    training: Training
    reports: Mapping[int, Metrics]

    def at(self, tokens: int) -> Metrics:
        """The figures at so many tokens: those of the last report up to there, of the first where none is earlier."""
        earlier = [reported for reported in self.reports if reported <= tokens]
        return self.reports[max(earlier) if earlier else min(self.reports)]

    @property
    def seconds_per_token(self) -> float:
        return self.training.seconds / self.training.tokens_done


@dataclass(frozen=True)
class RecordedStudy:
    """A study's finished trainings in the order of asking; `reference` = (l0 cap, kl_baseline) of its hypervolume."""

    study_id: str
    layer: int
    reference: tuple[float, float]
    trainings: Sequence[RecordedTraining]


@dataclass(frozen=True)
class RecordedSweep:
    """A sweep's current studies, the search that its file asked for, and the tokens of a step and of a training.

    `outside` counts finished trainings that are left out: those outside the file's present space.
    """

    name: str
    search: SearchConfig
    tokens_per_step: int
    steps: int
    studies: Sequence[RecordedStudy]
    outside: int

    @property
    def tokens(self) -> int:
        """Tokens of all trainings to their end."""
        return self.steps * self.tokens_per_step * sum(len(study.trainings) for study in self.studies)


def read_recorded_sweep(ledger: Ledger) -> RecordedSweep:
    """Reads what a replay needs. Raises InputError when no training of the sweep's present space has finished."""
    config = ledger.sweep().config
    if config.get("task") == "pair_mask":
        raise InputError(f"{ledger.where}: is of pair masks; only searches for transcoders can be replayed")
    search = SearchConfig.model_validate(config["search"])
    training, context = config["training"], config["corpus"]["context"]
    per_step = training["batch_sequences"] * context
    studies, outside = [], 0
    # what cannot be read is the ledger's to report
    with ledger.transaction():
        for study in ledger.studies():
            if not (study.is_current and study.reference):
                continue
            finished = ledger.trainings(study.study_id, "finished")
            inside = [
                one for one in finished if any(contains(each, canonical(one.hyperparameters)) for each in search.space)
            ]
            outside += len(finished) - len(inside)
            recorded = [_recorded(ledger, one) for one in inside]
            studies.append(RecordedStudy(study.study_id, study.layer, study.reference_point, recorded))
    if not any(study.trainings for study in studies):
        raise InputError(
            f"{ledger.where}: no training of this sweep's present space has finished, so there is nothing to replay"
        )
    return RecordedSweep(ledger.sweep().name, search, per_step, -(-training["tokens"] // per_step), studies, outside)


def _recorded(ledger: Ledger, training: Training) -> RecordedTraining:
    reports: dict[int, dict[str, float | None]] = {training.tokens_done: training.metrics}
    for report in ledger.reports(training.training_id):
        reports.setdefault(report.tokens, {})[report.name] = report.value
    return RecordedTraining(training, reports)
