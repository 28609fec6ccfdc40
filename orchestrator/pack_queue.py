"""Which pack trains next, and what becomes of what the packs report."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from orchestrator.budget import Budget
from orchestrator.checkpoints import Checkpoints
from orchestrator.identity import training_id
from orchestrator.ledger import Ledger, Training
from orchestrator.ledger_decisions import read_decisions
from orchestrator.ledger_tables import Decision
from orchestrator.pack_order import MemberOrder, MemberReport, PackOrder
from orchestrator.pareto import feasible, final_values
from orchestrator.rung_decisions import RungDecisions
from orchestrator.search.allocation import Allocation, Standing, in_turn
from orchestrator.search.halving import Halving
from orchestrator.search.study import Past, StudySearch
from orchestrator.status import hypervolumes_in_time
from qkmodel.hyperparameters import Hyperparameters

MAX_FAILURES = 3
_log = logging.getLogger(__name__)


@dataclass
class StudyWork:
    """A study, its search, and what its packs have in common (`template`: an order without members; `machine`: facts
    about where they train, for the ledger).

    `wanted` are the ids of the trainings to finish: those to continue, and those proposed since the start.
    """

    study_id: str
    search: StudySearch
    tokens_per_step: int
    steps: int
    template: Callable[..., PackOrder]
    machine: Mapping[str, int | str]
    wanted: set[str]
    exhausted: bool = False

    @property
    def tokens_planned(self) -> int:
        return self.steps * self.tokens_per_step


@dataclass(frozen=True)
class QueueSettings:
    """How trainings become packs. `trainings` is the most that all studies together may begin; None: no limit."""

    pack_size: int
    halving: Halving | None = None
    allocation: Allocation = "even"
    trainings: int | None = None


@dataclass(frozen=True)
class _Waiting:
    """A training that can go on: from which checkpoint, and until which step."""

    training: Training
    checkpoint: Path | None
    steps_done: int
    last_step: int


@dataclass(frozen=True)
class _Group:
    """Trainings that can be in one pack: same study, same steps done, same stop."""

    study: StudyWork
    members: list[_Waiting] = field(default_factory=list)


class PackQueue:
    """Hands out packs and books their results; the ledger is its only memory.

    Unfinished trainings come first, each from its newest checkpoint; then what the studies propose, in turn. At a rung
    a pack ends, and those of its members that go on wait for the next one. Raises OSError and UnknownFormat for
    checkpoints that are there and cannot be used now.
    """

    def __init__(
        self,
        ledger: Ledger,
        studies: Sequence[StudyWork],
        checkpoints: Checkpoints,
        settings: QueueSettings,
        budget: Budget,
    ) -> None:
        self._ledger = ledger
        self._studies = {study.study_id: study for study in studies}
        self._checkpoints = checkpoints
        self._settings = settings
        self._budget = budget
        # one per sweep: all its studies have batches of one size
        per_step = next((study.tokens_per_step for study in studies), 1)
        self._decisions = RungDecisions(ledger, settings.halving, per_step)
        self._running: dict[str, PackOrder] = {}
        # of the members of running packs: what they had trained on when their pack began
        self._tokens_before: dict[str, int] = {}
        self._packs_made = 0
        # once set, no pack is handed out any more, and those that end are not at fault
        self.stopping = False
        self._is_out_of_tokens = False
        # of those that no pack has at present: read once, since all of a checkpoint is hashed
        self._waiting: dict[str, _Waiting] = {}
        ledger.reopen_running()
        for study in studies:
            for training in ledger.trainings(study.study_id):
                if training.training_id in study.wanted and training.state in ("failed", "stopped"):
                    ledger.reopen(training.training_id)
        # now, so that a checkpoint that cannot be used is said before any pack runs
        self._unfinished_group()

    def next_pack(self) -> PackOrder | Literal["finished"] | None:
        """The next pack; None when there is nothing until a running pack ends; "finished" when all is done."""
        if self.stopping:
            return None if self._running else "finished"
        group = self._unfinished_group() or self._proposed_group() or self._second_chances()
        if group is None:
            return None if self._running else "finished"
        members = self._packful(group)
        self._packs_made += 1
        order = group.study.template(
            pack_id=f"pack-{self._packs_made:04d}",
            members=tuple(
                MemberOrder(
                    training_id=one.training.training_id,
                    hyperparameters=Hyperparameters(**one.training.hyperparameters),
                    checkpoint=one.checkpoint,
                )
                for one in members
            ),
            steps_done=members[0].steps_done,
            last_step=members[0].last_step,
        )
        for one in members:
            self._waiting.pop(one.training.training_id, None)
            self._tokens_before[one.training.training_id] = self._ledger.training(one.training.training_id).tokens_done
            self._ledger.start(one.training.training_id, order.pack_id, group.study.machine)
        self._running[order.pack_id] = order
        return order

    def exceeded_budget(self) -> str | None:
        """The budget after which packs have to end, in words."""
        return self._budget.exceeded()

    @property
    def token_line(self) -> str | None:
        """That the tokens did not suffice for all trainings, in words."""
        return "search.tokens are used up" if self._is_out_of_tokens else None

    def record(self, pack_id: str, reports: Sequence[MemberReport]) -> None:
        """Books what a pack reported; what says a thing again about a training that has ended changes nothing."""
        study, reached = self._study_of(pack_id), []
        for report in reports:
            training = self._ledger.training(report.training_id)
            if training.state != "running":
                continue
            progress = report.metrics if report.dictionary is None else {}
            self._ledger.report(training.training_id, report.tokens, progress, training.seconds + report.seconds)
            if report.error is not None:
                self._ledger.fail(training.training_id, report.error)
                study.search.tell(training.hyperparameters, None)
            elif report.dictionary is not None and report.dictionary_sha256 is not None:
                self._finish(study, report)
            else:
                reached.append((training, report))
        self._decide(study, reached)

    def end(self, pack_id: str, error: str | None) -> None:
        """A pack stopped. What it left unfinished goes back into the queue, or fails once too many died with it."""
        order = self._running.pop(pack_id)
        study = self._studies[self._ledger.training(order.members[0].training_id).study_id]
        for member in order.members:
            training = self._ledger.training(member.training_id)
            if training.state != "running":
                continue
            if error is None and (self.stopping or training.tokens_done == order.last_step * study.tokens_per_step):
                # asked to stop, or past a rung
                self._ledger.reopen(training.training_id, training.failures)
                continue
            # whoever got further since the pack began will get further again
            earlier = training.failures if training.tokens_done == self._tokens_before[training.training_id] else 0
            reason, failures = error or "its pack ended before it did", earlier + 1
            if failures < MAX_FAILURES:
                _log.warning("%s: %s; it is tried again", training.training_id, reason)
                self._ledger.reopen(training.training_id, failures)
            else:
                self._ledger.fail(training.training_id, f"{reason} (attempt {failures} of {MAX_FAILURES})")
                study.search.tell(training.hyperparameters, None)

    def _finish(self, study: StudyWork, report: MemberReport) -> None:
        self._ledger.finish(report.training_id, report.metrics, report.dictionary, report.dictionary_sha256)
        training = self._ledger.training(report.training_id)
        study.search.tell(training.hyperparameters, final_values(training), feasible(training))
        self._checkpoints.discard(training.training_id)

    def _decide(self, study: StudyWork, reached: Sequence[tuple[Training, MemberReport]]) -> None:
        if not reached:
            return
        by_id = {training.training_id: training for training, _ in reached}
        at_rung = [(training, report.metrics) for training, report in reached]
        for decision in self._decisions.decide(at_rung, reached[0][1].tokens):
            if not decision.kept:
                training = by_id[decision.training_id]
                study.search.tell(training.hyperparameters, decision.expected, decision.feasible)
                # otherwise it may get a second chance
                if not self._budget.is_of_tokens:
                    self._checkpoints.discard(training.training_id)

    def _packful(self, group: _Group) -> list[_Waiting]:
        """As many as a pack holds; after a failure half as many, and the last attempt is made alone.

        What is too large for the memory then fits, and a training that kills its pack takes no other with it.
        """
        first = max(group.members, key=lambda one: one.training.failures)
        together = [one for one in group.members if one.training.failures == first.training.failures]
        if first.training.failures >= MAX_FAILURES - 1:
            return together[:1]
        return together[: max(1, self._settings.pack_size >> first.training.failures)]

    def _unfinished_group(self) -> _Group | None:
        groups: dict[tuple[str, int, int], _Group] = {}
        for training in self._ledger.trainings(state="open"):
            study = self._studies.get(training.study_id)
            if study is None or training.training_id not in study.wanted:
                continue
            one = self._wait(study, training)
            key = (training.study_id, one.steps_done, one.last_step)
            groups.setdefault(key, _Group(study)).members.append(one)
        return max(groups.values(), key=lambda group: group.members[0].steps_done, default=None)

    def _wait(self, study: StudyWork, training: Training) -> _Waiting:
        if training.training_id not in self._waiting:
            path, steps = None, 0
            found = self._checkpoints.newest(training.training_id)
            if found is not None:
                path, header = found
                steps = header.steps_done
                # a driver may have died between a worker's writing this and hearing of it
                tokens = steps * study.tokens_per_step
                self._ledger.report(training.training_id, tokens, header.progress, training.seconds)
            last_step = self._decisions.next_stop(training.training_id, steps, study.steps)
            self._waiting[training.training_id] = _Waiting(training, path, steps, last_step)
        return self._waiting[training.training_id]

    def _proposed_group(self) -> _Group | None:
        asking = {study.study_id: study for study in self._studies.values() if not study.exhausted}
        for study_id in in_turn([self._standing(study) for study in asking.values()], self._settings.allocation):
            study, group = asking[study_id], _Group(asking[study_id])
            room = self._budget.allows(self._room(), study.tokens_planned)
            self._is_out_of_tokens = room == 0 < self._room()
            while len(group.members) < room:
                proposal = study.search.ask()
                if proposal is None:
                    study.exhausted = True
                    break
                identifier = training_id(study.study_id, proposal)
                study.wanted.add(identifier)
                training = self._ledger.add_training(study.study_id, identifier, proposal, study.tokens_planned)
                group.members.append(self._wait(study, training))
            if group.members:
                return group
        return None

    def _second_chances(self) -> _Group | None:
        """The best of the stopped trainings, for tokens that are left once all proposals were begun."""
        if not self._budget.is_of_tokens:
            return None
        stopped = {study_id: self._decisions.stopped(study_id) for study_id in self._studies}
        study = max(self._studies.values(), key=lambda one: len(stopped[one.study_id]), default=None)
        if study is None:
            return None
        room = self._budget.allows(self._settings.pack_size, study.tokens_planned)
        chosen = stopped[study.study_id][:room]
        for identifier in chosen:
            study.wanted.add(identifier)
            self._ledger.reopen(identifier)
        return self._unfinished_group() if chosen else None

    def _room(self) -> int:
        """How many trainings may be begun now."""
        if self._settings.trainings is None:
            return self._settings.pack_size
        begun = sum(sum(self._ledger.counts(study_id).values()) for study_id in self._studies)
        return min(self._settings.pack_size, self._settings.trainings - begun)

    def _standing(self, study: StudyWork) -> Standing:
        begun = sum(self._ledger.counts(study.study_id).values())
        if self._settings.allocation == "even":
            return Standing(study.study_id, begun)
        return Standing(study.study_id, begun, hypervolumes_in_time(self._ledger, study.study_id))

    def _study_of(self, pack_id: str) -> StudyWork:
        return self._studies[self._ledger.training(self._running[pack_id].members[0].training_id).study_id]


def history(ledger: Ledger, study_id: str, wanted: Collection[str]) -> list[Past]:
    """A study's trainings as its search wants them, in the order of asking; those `wanted` are still to finish."""
    stopped = {one.training_id: one for one in read_decisions(ledger, study_id) if not one.kept}
    return [_past(one, one.training_id in wanted, stopped.get(one.training_id)) for one in ledger.trainings(study_id)]


def _past(training: Training, is_wanted: bool, stopped: Decision | None) -> Past:
    if is_wanted or training.state in ("open", "running"):
        return Past(training.hyperparameters, "open")
    if training.state == "stopped" and stopped is not None:
        return Past(training.hyperparameters, "stopped", stopped.expected, stopped.feasible)
    return Past(training.hyperparameters, training.state, final_values(training), feasible(training))
