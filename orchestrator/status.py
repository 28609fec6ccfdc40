"""A sweep's state in figures, for the live table, `orchestrate status` and `orchestrate fronts`."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from orchestrator.ledger import Ledger
from orchestrator.ledger_records import STATES, State, Study, Training
from orchestrator.pareto import front_trainings, hypervolume, point_of
from orchestrator.study_names import study_titles
from orchestrator.tracking_notes import owed

FRONT_METRICS = (
    "kl",
    "kl_recovered",
    "kl_no_bos",
    "kl_recovered_no_bos",
    "l0_query",
    "l0_key",
    "l0",
    "top1",
    "max_error",
    "ce_recovered",
)
MASK_METRICS = (
    "kl_masked",
    "kl_masked_recovered",
    "kl",
    "kl_no_pairs",
    "kl_unmasked",
    "mask_recovered",
    "pairs_kept",
    "pairs_share",
    "pairs_share_active",
    "pairs_for_90",
    "variance_share",
    "bias_share",
    "unpaired_query",
    "unpaired_key",
    "ce_recovered",
)


@dataclass(frozen=True)
class StudyStatus:
    """One study: its trainings and the front they make. `hypervolume` as `pareto.hypervolume` defines it.

    `title` names the study among those of its sweep.
    """

    study: Study
    title: str
    trainings: list[Training]
    front: list[Training]
    hypervolume: float

    @property
    def counts(self) -> dict[State, int]:
        counts: dict[State, int] = dict.fromkeys(STATES, 0)
        for training in self.trainings:
            counts[training.state] += 1
        return counts

    @property
    def tokens_done(self) -> int:
        return sum(training.tokens_done for training in self.trainings)

    @property
    def tokens_planned(self) -> int:
        """What the tokens come to when the sweep is done; nothing is planned beyond what a former study has."""
        return self.tokens_done if self.study.tokens_planned is None else self.study.tokens_planned


def study_statuses(ledger: Ledger, studies: list[str] | None = None) -> list[StudyStatus]:
    """All studies of a sweep, or those named, by layer.

    Raises InputError when the ledger does not say what a front is measured against.
    """
    # what cannot be read is the ledger's to report
    with ledger.transaction():
        all_studies = ledger.studies()
        titles = study_titles(all_studies)
        return [
            _study_status(ledger, study, titles[study.study_id])
            for study in all_studies
            if studies is None or study.study_id in studies
        ]


def _study_status(ledger: Ledger, study: Study, title: str) -> StudyStatus:
    trainings = ledger.trainings(study.study_id)
    front = front_trainings(trainings)
    return StudyStatus(study, title, trainings, front, _area(study, front))


def _area(study: Study, front: list[Training]) -> float:
    if not front:
        return 0.0
    return hypervolume([point_of(one) for one in front], study.reference_point)


class HypervolumesInTime:
    """A study's hypervolume after each training that finished, in the order in which they did.

    Formed once per training, since whoever asks does so at every proposal.
    """

    def __init__(self, study: Study, trainings: Iterable[Training] = ()) -> None:
        """`trainings` of the study, in whatever order and state."""
        self._study = study
        self.values: list[float] = []
        self._front: list[Training] = []
        finished = (one for one in trainings if one.state == "finished")
        for training in sorted(finished, key=lambda one: (one.finished, one.number)):
            self.add(training)

    def add(self, training: Training) -> None:
        """The next training that has finished."""
        self._front = front_trainings([*self._front, training])
        self.values.append(_area(self._study, self._front))


@dataclass(frozen=True)
class HypervolumePoint:
    """A study's hypervolume once a training had finished: after how many tokens of those ended by then, and when."""

    tokens: int
    at: datetime
    value: float


def hypervolumes_by_tokens(status: StudyStatus) -> list[HypervolumePoint]:
    """A point per finished training of a study, in the order in which they finished."""
    ended = [training for training in status.trainings if training.finished is not None]
    ended.sort(key=lambda one: (one.finished, one.number))
    values = iter(HypervolumesInTime(status.study, ended).values)
    tokens, points = 0, []
    for training in ended:
        tokens += training.tokens_done
        if training.state == "finished":
            points.append(HypervolumePoint(tokens, training.finished, next(values)))
    return points


def status_record(ledger: Ledger) -> dict[str, Any]:
    """What `orchestrate status --json` prints: counts by state, tokens done and planned, per study and in all.

    All together are the studies that the sweep file asked for at the latest start.
    """
    statuses = study_statuses(ledger)
    current = [status for status in statuses if status.study.is_current]
    return {
        "sweep": ledger.sweep().name,
        "folder": ledger.storage.shown(ledger.folder),
        "trainings": {state: sum(status.counts[state] for status in current) for state in STATES},
        "tokens_done": sum(status.tokens_done for status in current),
        "tokens_planned": sum(status.tokens_planned for status in current),
        "owed": asdict(owed(ledger)),
        "studies": [
            {
                "study_id": status.study.study_id,
                "layer": status.study.layer,
                "current": status.study.is_current,
                "trainings": status.counts,
                "tokens_done": status.tokens_done,
                "tokens_planned": status.tokens_planned,
                "front": len(status.front),
                "hypervolume": status.hypervolume,
            }
            for status in statuses
        ],
        "failures": [
            {"training_id": one.training_id, "layer": one.layer, "error": one.error}
            for status in current
            for one in status.trainings
            if one.state == "failed"
        ],
    }


def fronts_record(ledger: Ledger) -> dict[str, Any]:
    """What `orchestrate fronts --json` prints: per study its front's trainings by ascending l0."""
    return {
        "sweep": ledger.sweep().name,
        "fronts": [
            {
                "study_id": status.study.study_id,
                "layer": status.study.layer,
                "kl_baseline": status.study.reference.get("kl_baseline"),
                "kl_cache": status.study.reference.get("kl_cache"),
                "hypervolume": status.hypervolume,
                "trainings": [front_member(ledger, training) for training in status.front],
            }
            for status in study_statuses(ledger)
        ],
    }


def front_member(ledger: Ledger, training: Training) -> dict[str, Any]:
    """One training of a front: identity, metrics, hyperparameters and where its dictionary lies."""
    shown = MASK_METRICS if training.task == "pair_mask" else FRONT_METRICS
    return {
        "training_id": training.training_id,
        **{name: training.metrics.get(name) for name in shown},
        "dictionary": ledger.storage.shown(ledger.folder / training.dictionary) if training.dictionary else None,
        "dictionary_sha256": training.dictionary_sha256,
        "hyperparameters": training.hyperparameters,
    }
