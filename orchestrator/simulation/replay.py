"""A finished sweep's trainings under another policy, in virtual time: the real queue, searches and decisions.

What is replayed instead of trained: a proposal snaps to the nearest recorded training of its alternative that was not
used yet, and its figures at a rung are those of its last report up to there. What a pack takes is what its members took
when they were recorded.
"""

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from optuna.trial import Trial, TrialState

from orchestrator.budget import Budget, Limits
from orchestrator.ledger import Ledger, Training
from orchestrator.pack_order import MemberOrder, MemberReport
from orchestrator.pack_queue import PackQueue, QueueSettings, StudyWork
from orchestrator.pareto import feasible, hypervolume, point_of
from orchestrator.search.config import resolve_halving
from orchestrator.search.halving import Halving
from orchestrator.search.samplers import resolve_auto
from orchestrator.search.space import Alternative, Range, canonical, contains, dimensions, values
from orchestrator.search.space_checks import validate_space
from orchestrator.search.study import StudySearch
from orchestrator.simulation.policy import Policy
from orchestrator.simulation.recorded import RecordedStudy, RecordedSweep, RecordedTraining
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.pack import CheckpointHeader

SNAPPING_RULE = (
    "a proposal stands for the nearest recorded training of its alternative that was not used yet (where none of it is "
    "left, for any), by distance between hyperparameters scaled to their ranges (on a logarithmic scale where the "
    "range is); figures at a rung are those of the last report up to it"
)


@dataclass(frozen=True)
class VirtualPack:
    """In the place of a `PackOrder`."""

    study_id: str
    pack_id: str
    members: tuple[MemberOrder, ...]
    steps_done: int
    last_step: int


@dataclass(frozen=True)
class Point:
    """How far a replay was when a training had finished: tokens trained on, virtual seconds, and hypervolume.

    `share` is the mean over layers of the hypervolume's share of what all recorded trainings reach.
    """

    tokens: int
    seconds: float
    share: float


class RecordedSearch(StudySearch):
    """A search whose proposals are carried out at recorded points, each once."""

    def __init__(self, recorded: Sequence[Mapping[str, Any]], alternatives: Sequence[Alternative], *more: Any) -> None:
        self._left = [canonical(point) for point in recorded]
        super().__init__(alternatives, *more)

    def ask(self) -> dict[str, Any] | None:
        return super().ask() if self._left else None

    def _placed(self, trial: Trial) -> Trial:
        proposed = self._hyperparameters(trial)
        nearest = min(self._left, key=lambda point: distance(self._alternatives, proposed, point))
        self._left.remove(nearest)
        if nearest == proposed:
            return trial
        self._study.tell(trial, state=TrialState.FAIL)
        return self._start_trial(nearest)


def distance(alternatives: Sequence[Alternative], one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Between two points of a space; infinite where no alternative holds both. Every dimension counts from 0 to 1."""
    for alternative in alternatives:
        if contains(alternative, one) and contains(alternative, other):
            names = dimensions(alternative)
            return math.hypot(*(_apart(alternative[name], one[name], other[name]) for name in names))
    return math.inf


def _apart(setting: Any, one: Any, other: Any) -> float:
    if not isinstance(setting, Range):
        if isinstance(one, str):
            return float(one != other)
        steps = sorted(values(setting))
        return abs(steps.index(one) - steps.index(other)) / max(1, len(steps) - 1)
    scale = math.log if setting.log else float
    return abs(scale(one) - scale(other)) / (scale(setting.high) - scale(setting.low))


class _VirtualCheckpoints:
    """How far each training is, in the place of files."""

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}

    def whole(self, training_id: str) -> Iterator[tuple[Path, CheckpointHeader]]:
        if steps := self.steps.get(training_id, 0):
            yield Path(), CheckpointHeader(training_id=training_id, steps_done=steps)

    def discard(self, training_id: str) -> None:
        self.steps.pop(training_id, None)


def replay(sweep: RecordedSweep, policy: Policy) -> list[Point]:
    """The hypervolume after every training that the policy finishes, the last of them when it ends.

    Raises InputError when the policy's sampler cannot search the space that was recorded.
    """
    with TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.sqlite")
        try:
            return _Replay(sweep, policy, ledger).run()
        finally:
            ledger.close()


class _Replay:
    def __init__(self, sweep: RecordedSweep, policy: Policy, ledger: Ledger) -> None:
        self._sweep = sweep
        self._policy = policy
        self._ledger = ledger
        self._checkpoints = _VirtualCheckpoints()
        self._studies = {study.study_id: study for study in sweep.studies}
        # study id, hyperparameters -> what was recorded
        self._recorded = {
            (study.study_id, Hyperparameters(**one.training.hyperparameters)): one
            for study in sweep.studies
            for one in study.trainings
        }
        self._whole = {
            study.study_id: area(study, [one.training for one in study.trainings]) for study in sweep.studies
        }
        validate_space(sweep.search.space, self._sampler, self._trainings)
        self._finished: dict[str, list[Training]] = {study.study_id: [] for study in sweep.studies}
        self._queue = self._open_queue()

    def run(self) -> list[Point]:
        """Events in the order of virtual time: a pack reaches its stop."""
        points, tokens, now = [Point(0, 0.0, 0.0)], 0, 0.0
        running: list[tuple[float, int, VirtualPack]] = []
        number = 0
        while True:
            while len(running) < self._policy.packs_at_once and isinstance(
                order := self._queue.next_pack(), VirtualPack
            ):
                heapq.heappush(running, (now + self._seconds(order), number, order))
                number += 1
            if not running:
                return points
            now, _, order = heapq.heappop(running)
            tokens += len(order.members) * (order.last_step - order.steps_done) * self._sweep.tokens_per_step
            self._report(order)
            if order.last_step == self._sweep.steps:
                points.append(Point(tokens, now, self._share()))

    def _report(self, order: VirtualPack) -> None:
        is_last = order.last_step == self._sweep.steps
        tokens = order.last_step * self._sweep.tokens_per_step
        reports = []
        for member in order.members:
            one = self._of(order, member.training_id)
            self._checkpoints.steps[member.training_id] = order.last_step
            metrics = one.training.metrics if is_last else one.at(tokens)
            where = {"dictionary": "replayed", "dictionary_sha256": "replayed"} if is_last else {}
            reports.append(
                MemberReport(training_id=member.training_id, tokens=tokens, seconds=0.0, metrics=metrics, **where)
            )
            if is_last:
                self._finished[order.study_id].append(one.training)
        self._queue.record(order.pack_id, reports)
        self._queue.end(order.pack_id, None)

    def _seconds(self, order: VirtualPack) -> float:
        stretch = (order.last_step - order.steps_done) * self._sweep.tokens_per_step
        return sum(self._of(order, member.training_id).seconds_per_token for member in order.members) * stretch

    def _of(self, order: VirtualPack, training_id: str) -> RecordedTraining:
        (member,) = (one for one in order.members if one.training_id == training_id)
        return self._recorded[order.study_id, member.hyperparameters]

    def _share(self) -> float:
        shares = [
            area(study, self._finished[study_id]) / self._whole[study_id]
            for study_id, study in self._studies.items()
            if self._whole[study_id] > 0
        ]
        return sum(shares) / len(shares)

    def _open_queue(self) -> PackQueue:
        sweep, policy = self._sweep, self._policy
        self._ledger.open_sweep(sweep.name, {}, None, {})
        works = [self._work(study) for study in sweep.studies]
        new = self._trainings * len(works) if policy.layer_allocation == "by_progress" else None
        settings = QueueSettings(policy.pack, self._halving, policy.layer_allocation, new)
        return PackQueue(
            self._ledger,
            works,
            self._checkpoints,
            settings,
            Budget(Limits(policy.tokens), self._ledger, self._studies.keys(), 0),
        )

    def _work(self, study: RecordedStudy) -> StudyWork:
        sweep = self._sweep
        self._ledger.open_study(study.study_id, "transcoder", study.layer, {}, model="", corpus="")
        self._ledger.set_reference(study.study_id, {"l0_cap": study.reference[0], "kl_baseline": study.reference[1]})
        recorded = [one.training.hyperparameters for one in study.trainings]
        # several layers learn nothing from one another: each has chances of its own
        seed = self._policy.seed * 1_000 + study.layer
        budget = len(recorded) if self._policy.layer_allocation == "by_progress" else self._trainings
        search = RecordedSearch(recorded, sweep.search.space, self._sampler, budget, seed)
        template = partial(VirtualPack, study.study_id)
        return StudyWork(study.study_id, search, sweep.tokens_per_step, sweep.steps, template, {}, set())

    @property
    def _trainings(self) -> int:
        """Per layer."""
        return self._policy.trainings or max(len(study.trainings) for study in self._sweep.studies)

    @property
    def _sampler(self) -> str:
        wanted = self._policy.sampler
        return resolve_auto(self._sweep.search.space, self._trainings) if wanted == "auto" else wanted

    @property
    def _halving(self) -> Halving | None:
        sweep = self._sweep
        return resolve_halving(self._policy.halving, self._sampler, self._trainings, sweep.steps, sweep.tokens_per_step)


def area(study: RecordedStudy, trainings: Sequence[Training]) -> float:
    """The hypervolume of those inside the feasible box."""
    points = [point_of(one) for one in trainings if feasible(one)]
    return hypervolume(points, study.reference)
