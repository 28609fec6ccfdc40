"""Which pack trains next, and what becomes of what the packs report."""

import logging
import platform
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

from orchestrator.identity import training_id
from orchestrator.ledger import Ledger, Training
from orchestrator.pack_order import MemberOrder, MemberReport, PackOrder, checkpoint_path
from orchestrator.pareto import feasible
from orchestrator.search.study import Past, StudySearch
from qkmodel.errors import InputError
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.pack import checkpoint_steps
from qkmodel.products import product_dtype
from qkmodel.tensor_file import UnknownFormat

MAX_ATTEMPTS = 3
_log = logging.getLogger(__name__)


@dataclass
class StudyWork:
    """A study, its search, and what its packs have in common (`template`: an order without members).

    `wanted` are the ids of the trainings to finish: those to continue, and those proposed since the start.
    """

    study_id: str
    search: StudySearch
    tokens_planned: int
    template: Callable[..., PackOrder]
    wanted: set[str]
    exhausted: bool = False


@dataclass(frozen=True)
class _Group:
    """Trainings that can be in one pack: same study, same number of steps done."""

    study: StudyWork
    steps_done: int
    trainings: list[Training] = field(default_factory=list)


class PackQueue:
    """Hands out packs and books their results; the ledger is its only memory.

    Unfinished trainings come first, each from its newest checkpoint; then what the studies propose, the study
    with the fewest trainings before the others. Raises OSError and UnknownFormat for checkpoints that are there and
    cannot be used now.
    """

    def __init__(self, ledger: Ledger, studies: Sequence[StudyWork], sweep_folder: Path, pack_size: int) -> None:
        self._ledger = ledger
        self._studies = {study.study_id: study for study in studies}
        self._folder = sweep_folder
        self._pack_size = pack_size
        self._running: dict[str, PackOrder] = {}
        self._attempts: Counter[str] = Counter()
        self._packs_made = 0
        # training id -> steps in its checkpoint, of those that no pack has at present: read once, since all is hashed
        self._steps: dict[str, int] = {}
        ledger.reopen_running()
        wanted = {identifier for study in studies for identifier in study.wanted}
        for training in ledger.trainings(state="failed"):
            if training.training_id in wanted:
                ledger.reopen(training.training_id)
        # now, so that a checkpoint that cannot be used is said before any pack runs
        self._unfinished_group()

    def next_pack(self) -> PackOrder | Literal["finished"] | None:
        """The next pack; None when there is nothing until a running pack ends; "finished" when all is done."""
        group = self._unfinished_group() or self._proposed_group()
        if group is None:
            return None if self._running else "finished"
        members = self._members_of(group)
        self._packs_made += 1
        order = group.study.template(
            pack_id=f"pack-{self._packs_made:04d}",
            members=tuple(
                MemberOrder(training_id=one.training_id, hyperparameters=Hyperparameters(**one.hyperparameters))
                for one in members
            ),
            steps_done=group.steps_done,
        )
        for training in members:
            self._attempts[training.training_id] += 1
            self._steps.pop(training.training_id, None)
            self._ledger.start(training.training_id, order.pack_id, _machine(order))
        self._running[order.pack_id] = order
        return order

    def record(self, pack_id: str, reports: Sequence[MemberReport]) -> None:
        """Books what a pack reported; what says a thing again about a training that has ended changes nothing."""
        study = self._study_of(pack_id)
        for report in reports:
            if self._ledger.training(report.training_id).state != "running":
                continue
            self._ledger.report(
                report.training_id,
                report.tokens,
                {name: value for name, value in report.metrics.items() if report.dictionary is None},
                self._seconds_so_far(report),
            )
            if report.error is not None:
                self._ledger.fail(report.training_id, report.error)
                study.search.tell(self._ledger.training(report.training_id).hyperparameters, None)
            elif report.dictionary is not None and report.dictionary_sha256 is not None:
                self._ledger.finish(report.training_id, report.metrics, report.dictionary, report.dictionary_sha256)
                self._tell_finished(study, self._ledger.training(report.training_id))
                checkpoint_path(self._folder, report.training_id).unlink(missing_ok=True)

    def end(self, pack_id: str, error: str | None) -> None:
        """A pack stopped. What it left unfinished goes back into the queue, or fails after three attempts."""
        order = self._running.pop(pack_id)
        study = self._studies[self._ledger.training(order.members[0].training_id).study_id]
        for member in order.members:
            training = self._ledger.training(member.training_id)
            if training.state != "running":
                continue
            reason = error or "its pack ended before it did"
            if self._attempts[member.training_id] < MAX_ATTEMPTS:
                _log.warning("%s: %s; it is tried again", member.training_id, reason)
                self._ledger.reopen(member.training_id)
            else:
                self._ledger.fail(member.training_id, f"{reason} (attempt {MAX_ATTEMPTS} of {MAX_ATTEMPTS})")
                study.search.tell(training.hyperparameters, None)

    def _members_of(self, group: _Group) -> list[Training]:
        """A packful. The last attempt is made alone, so that a training that kills its pack takes no other with it."""
        together = [one for one in group.trainings if self._attempts[one.training_id] < MAX_ATTEMPTS - 1]
        return together[: self._pack_size] or group.trainings[:1]

    def _unfinished_group(self) -> _Group | None:
        groups: dict[tuple[str, int], _Group] = {}
        for training in self._ledger.trainings(state="open"):
            study = self._studies.get(training.study_id)
            if study is None or training.training_id not in study.wanted:
                continue
            if training.training_id not in self._steps:
                self._steps[training.training_id] = self._steps_done(training)
            steps = self._steps[training.training_id]
            groups.setdefault((training.study_id, steps), _Group(study, steps)).trainings.append(training)
        return max(groups.values(), key=lambda group: group.steps_done, default=None)

    def _proposed_group(self) -> _Group | None:
        asking = [study for study in self._studies.values() if not study.exhausted]
        asking.sort(key=lambda study: sum(self._ledger.counts(study.study_id).values()))
        for study in asking:
            group = _Group(study, 0)
            while len(group.trainings) < self._pack_size:
                proposal = study.search.ask()
                if proposal is None:
                    study.exhausted = True
                    break
                identifier = training_id(study.study_id, proposal)
                study.wanted.add(identifier)
                group.trainings.append(
                    self._ledger.add_training(study.study_id, identifier, proposal, study.tokens_planned)
                )
            if group.trainings:
                return group
        return None

    def _steps_done(self, training: Training) -> int:
        """Steps that the training's checkpoint holds; a damaged one or another's is put aside.

        Raises OSError when it cannot be read at all, and UnknownFormat.
        """
        path = checkpoint_path(self._folder, training.training_id)
        if not path.exists():
            return 0
        try:
            return checkpoint_steps(path, training.training_id)
        except UnknownFormat:
            # whole, and the work of many hours perhaps: not ours to put aside
            raise
        except InputError as error:
            aside = path.with_name(f"{path.name}.damaged")
            # without its advice, which is for whoever has to put it aside
            wrong, _, _ = str(error).rpartition("; ")
            _log.warning("%s; it is kept as %s and the training starts over", wrong, aside.name)
            path.replace(aside)
            return 0

    def _study_of(self, pack_id: str) -> StudyWork:
        return self._studies[self._ledger.training(self._running[pack_id].members[0].training_id).study_id]

    def _seconds_so_far(self, report: MemberReport) -> float:
        return self._ledger.training(report.training_id).seconds + report.seconds

    @staticmethod
    def _tell_finished(study: StudyWork, training: Training) -> None:
        study.search.tell(training.hyperparameters, _values(training), feasible(training))


def _machine(order: PackOrder) -> dict[str, int | str]:
    """What a training ran on, and what its settings came to there."""
    products = product_dtype(order.training.precision, torch.device(order.device))
    return {
        "threads": order.threads,
        "device": order.device,
        "products": str(products).removeprefix("torch."),
        "activations": "streamed" if order.streamed else "cached",
        "node": platform.node(),
        "torch": version("torch"),
    }


def history(trainings: Sequence[Training], wanted: Collection[str]) -> list[Past]:
    """A study's trainings as its search wants them, in the order of asking; those `wanted` are still to finish."""
    return [
        Past(
            hyperparameters=one.hyperparameters,
            state="open" if one.training_id in wanted or one.state in ("open", "running") else one.state,
            values=_values(one),
            feasible=feasible(one),
        )
        for one in trainings
    ]


def _values(training: Training) -> tuple[float, float] | None:
    kl, l0 = training.metrics.get("kl"), training.metrics.get("l0")
    return None if kl is None or l0 is None else (kl, l0)
