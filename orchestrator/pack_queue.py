"""Which pack trains next, and what becomes of what the packs report."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from orchestrator.budget import Budget
from orchestrator.checkpoints import Checkpoints
from orchestrator.identity import training_id
from orchestrator.ledger import Ledger, Training
from orchestrator.ledger_decisions import read_decisions
from orchestrator.ledger_records import Decision
from orchestrator.pack_order import MemberOrder, MemberReport, PackOrder
from orchestrator.pareto import feasible, final_values
from orchestrator.rung_decisions import RungDecisions
from orchestrator.search.allocation import Allocation, Standing, in_turn
from orchestrator.search.halving import Halving
from orchestrator.search.study import Past, StudySearch
from orchestrator.status import HypervolumesInTime
from qkmodel.tasks import parse_hyperparameters

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
    """How trainings become packs. `new` is how many all studies together may still begin; None: as each proposes."""

    pack_size: int
    halving: Halving | None = None
    allocation: Allocation = "even"
    new: int | None = None


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

    What is done patiently is done again where the ledger's server went away in it: nobody but the ledger hears of it.

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
        self._running: dict[str, tuple[StudyWork, PackOrder]] = {}
        self._hypervolumes: dict[str, HypervolumesInTime] = {}
        if settings.allocation == "by_progress":
            recorded = [study for study in ledger.studies() if study.study_id in self._studies]
            self._hypervolumes = {
                study.study_id: HypervolumesInTime(study, ledger.trainings(study.study_id)) for study in recorded
            }
        self._packs_made = 0
        self._new = settings.new
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
                    hyperparameters=parse_hyperparameters(one.training.hyperparameters),
                    checkpoint=one.checkpoint,
                )
                for one in members
            ),
            steps_done=members[0].steps_done,
            last_step=members[0].last_step,
        )
        self._ledger.patiently(partial(self._start, order, group.study))
        self._running[order.pack_id] = group.study, order
        return order

    def _start(self, order: PackOrder, study: StudyWork) -> None:
        for member in order.members:
            self._waiting.pop(member.training_id, None)
            self._ledger.start(member.training_id, order.pack_id, study.machine)

    def exceeded_budget(self) -> str | None:
        """The budget after which packs have to end, in words."""
        return self._budget.exceeded()

    @property
    def token_line(self) -> str | None:
        """That the tokens did not suffice for all trainings, in words."""
        return "search.tokens are used up" if self._is_out_of_tokens else None

    def record(self, pack_id: str, reports: Sequence[MemberReport]) -> None:
        """Books what a pack reported; what says a thing again about a training that has ended changes nothing."""
        study, _ = self._running[pack_id]
        # at once, since every commit waits for the disk; what the ledger does not hold yet nobody is told
        after = self._ledger.patiently(partial(self._book_all, reports))
        for training, _ in after:
            if training.state != "running":
                self._tell_end(study, training)
        self._decide(study, [(training, one) for training, one in after if training.state == "running"])

    def end(self, pack_id: str, error: str | None) -> None:
        """A pack stopped. What it left unfinished goes back into the queue, or fails once too many died with it."""
        study, order = self._running.pop(pack_id)
        tokens_ordered = order.last_step * study.tokens_per_step
        for training in self._ledger.patiently(partial(self._put_back, order, error, tokens_ordered)):
            study.search.tell(training.hyperparameters, None)

    def _put_back(self, order: PackOrder, error: str | None, tokens_ordered: int) -> list[Training]:
        """What an ended pack left unfinished; answers those that failed for good."""
        left = [self._ledger.training(member.training_id) for member in order.members]
        left = [training for training in left if training.state == "running"]
        return [training for training in left if self._reopen_or_fail(training, error, tokens_ordered)]

    def _book_all(self, reports: Sequence[MemberReport]) -> list[tuple[Training, MemberReport]]:
        """Answers those that were running, each as it now stands."""
        found = [(self._ledger.training(one.training_id), one) for one in reports]
        booked = [(before, one) for before, one in found if before.state == "running"]
        for before, one in booked:
            self._book(before, one)
        return [(self._ledger.training(one.training_id), one) for _, one in booked]

    def _book(self, training: Training, report: MemberReport) -> None:
        identifier, seconds = training.training_id, training.seconds + report.seconds
        is_final = report.dictionary is not None and report.dictionary_sha256 is not None
        self._ledger.report(identifier, report.tokens, {} if is_final else report.metrics, seconds)
        if report.error is not None:
            self._ledger.fail(identifier, report.error)
        elif is_final:
            self._ledger.finish(identifier, report.metrics, report.dictionary, report.dictionary_sha256)

    def _tell_end(self, study: StudyWork, training: Training) -> None:
        if training.state == "failed":
            study.search.tell(training.hyperparameters, None)
            return
        study.search.tell(training.hyperparameters, final_values(training), feasible(training))
        self._decisions.finished(training)
        if training.study_id in self._hypervolumes:
            self._hypervolumes[training.study_id].add(training)
        self._checkpoints.discard(training.training_id)

    def _reopen_or_fail(self, training: Training, error: str | None, tokens_ordered: int) -> bool:
        """Books that the training's pack has ended before it did; answers whether it failed for good."""
        if self.stopping or (error is None and training.tokens_done == tokens_ordered):
            # asked to stop (a signal to the whole process group kills workers too), or past a rung
            self._ledger.reopen(training.training_id, training.failures)
            return False
        reason, failures = error or "its pack ended before it did", training.failures + 1
        if failures < MAX_FAILURES:
            _log.warning("%s: %s; it is tried again", training.training_id, reason)
            self._ledger.reopen(training.training_id, failures)
            return False
        self._ledger.fail(training.training_id, f"{reason} (attempt {failures} of {MAX_FAILURES})")
        return True

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
        for training in self._ledger.patiently(partial(self._ledger.trainings, state="open")):
            study = self._studies.get(training.study_id)
            if study is None or training.training_id not in study.wanted:
                continue
            one = self._wait(study, training)
            key = (training.study_id, one.steps_done, one.last_step)
            groups.setdefault(key, _Group(study)).members.append(one)
        return max(groups.values(), key=lambda group: group.members[0].steps_done, default=None)

    def _wait(self, study: StudyWork, training: Training) -> _Waiting:
        if training.training_id not in self._waiting:
            path, steps = self._farthest_checkpoint(study, training)
            last_step = self._decisions.next_stop(training.training_id, steps, study.steps)
            self._waiting[training.training_id] = _Waiting(training, path, steps, last_step)
        return self._waiting[training.training_id]

    def _farthest_checkpoint(self, study: StudyWork, training: Training) -> tuple[Path | None, int]:
        """Where the training goes on from, and the steps done there; what it had reported until then is booked."""
        found = []
        for path, header in self._checkpoints.whole(training.training_id):
            found.append((path, header))
            if header.steps_done * study.tokens_per_step <= training.tokens_done:
                break
        # A driver may have died between a worker's writing these and hearing of it, or have lost its ledger, whereupon
        # a worker went on once more.
        for _, header in reversed(found):
            tokens = header.steps_done * study.tokens_per_step
            report = partial(self._ledger.report, training.training_id, tokens, header.progress, training.seconds)
            self._ledger.patiently(report)
        return (found[0][0], found[0][1].steps_done) if found else (None, 0)

    def _proposed_group(self) -> _Group | None:
        asking = {study.study_id: study for study in self._studies.values() if not study.exhausted}
        for study_id in in_turn([self._standing(study) for study in asking.values()], self._settings.allocation):
            study = asking[study_id]
            room = self._budget.allows(self._room(), study.tokens_planned)
            self._is_out_of_tokens = room == 0 < self._room()
            proposals = []
            while len(proposals) < room:
                proposal = study.search.ask()
                if proposal is None:
                    study.exhausted = True
                    break
                proposals.append(proposal)
            group = _Group(study, self._ledger.patiently(partial(self._add, study, proposals)))
            if self._new is not None:
                self._new -= len(proposals)
            if group.members:
                return group
        return None

    def _add(self, study: StudyWork, proposals: Sequence[dict[str, Any]]) -> list[_Waiting]:
        """Records trainings that were proposed; answers how each can go on."""
        members = []
        for proposal in proposals:
            identifier = training_id(study.study_id, proposal)
            study.wanted.add(identifier)
            training = self._ledger.add_training(study.study_id, identifier, proposal, study.tokens_planned)
            # what was noted in a transaction that is done again is noted anew
            self._waiting.pop(identifier, None)
            members.append(self._wait(study, training))
        return members

    def _second_chances(self) -> _Group | None:
        """The best of the stopped trainings, for tokens that are left once all proposals were begun."""
        if not self._budget.is_of_tokens:
            return None
        stopped = {study_id: self._stopped_in_space(study) for study_id, study in self._studies.items()}
        study = max(self._studies.values(), key=lambda one: len(stopped[one.study_id]), default=None)
        if study is None:
            return None
        room = self._budget.allows(self._settings.pack_size, study.tokens_planned)
        chosen = stopped[study.study_id][:room]
        for identifier in chosen:
            study.wanted.add(identifier)
            self._ledger.reopen(identifier)
        return self._unfinished_group() if chosen else None

    def _stopped_in_space(self, study: StudyWork) -> list[str]:
        """What halving stopped of the space that the file has now, the best first."""
        stopped = (self._ledger.training(identifier) for identifier in self._decisions.stopped(study.study_id))
        return [one.training_id for one in stopped if study.search.holds(one.hyperparameters)]

    def _room(self) -> int:
        """How many trainings may be begun now."""
        size = self._settings.pack_size
        return size if self._new is None else min(size, self._new)

    def _standing(self, study: StudyWork) -> Standing:
        begun = sum(self._ledger.counts(study.study_id).values())
        grown = self._hypervolumes.get(study.study_id)
        return Standing(study.study_id, begun, grown.values if grown is not None else ())


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
