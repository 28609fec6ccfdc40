"""Which dictionary of a front is chosen: rules, what they are called, and what they pick."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from orchestrator.ledger_records import Training
from orchestrator.objectives import OBJECTIVES
from orchestrator.pareto import knee, point_of
from orchestrator.status import StudyStatus
from qkmodel.errors import InputError
from qkmodel.tasks import Task

# `l0=16` takes up to 17.6: where l0 is steered to a target, it ends a few per cent beside it
L0_TOLERANCE = Fraction(1, 10)
WHERE_IDS_ARE = "dictionaries/ in its folder has all by id, orchestrate fronts --json those on fronts"
RULES = "knee, l0=16, kl_recovered>=0.95 (of pair masks: pairs=9000, kl_masked_recovered>=0.95) or training=ID"

_DIGITS_OF_ID = 8
# what rules call what a front has few of
_SIZES: dict[str, Task] = {"l0": "transcoder", "pairs": "pair_mask"}
_RECOVERED: dict[str, Task] = {objectives.recovered: task for task, objectives in OBJECTIVES.items()}
_RULE = re.compile(
    r"knee"
    rf"|(?P<size>{'|'.join(_SIZES)})=(?P<most>\d{{1,9}}(?:\.\d{{1,4}})?)"
    rf"|(?P<recovered>{'|'.join(_RECOVERED)})>=(?P<share>\d(?:\.\d{{1,6}})?)"
    r"|training=(?P<training>[0-9a-zA-Z_-]+)",
    re.A,
)


@dataclass(frozen=True)
class Choice:
    """A finished training of a study, and the alias that it is registered under."""

    status: StudyStatus
    training: Training
    alias: str


@dataclass(frozen=True)
class KneeRule:
    """Where on the front more active features begin to buy less KL: `pareto.knee`."""

    slug: str = "knee"

    def pick(self, front: Sequence[Training]) -> Training | None:
        return front[knee([point_of(one) for one in front])] if front else None


@dataclass(frozen=True)
class SizeRule:
    """The lowest kl of those with at most so many active features per token, a tenth more allowed, or so many pairs.

    `named` is what the rule calls them.
    """

    named: str
    most: Fraction

    @property
    def task(self) -> Task:
        return _SIZES[self.named]

    @property
    def limit(self) -> float:
        return float(self.most * (1 + L0_TOLERANCE) if self.task == "transcoder" else self.most)

    @property
    def slug(self) -> str:
        return f"{self.named}-{_number(self.most)}"

    @property
    def words(self) -> str:
        return f"has {OBJECTIVES[self.task].size} ≤ {self.limit:g}"

    def pick(self, front: Sequence[Training]) -> Training | None:
        inside = [one for one in front if point_of(one)[0] <= self.limit]
        return min(inside, key=lambda one: (point_of(one)[1], one.number), default=None)


@dataclass(frozen=True)
class RecoveredRule:
    """The lowest l0, or the fewest pairs, of those that recover at least this share of the baseline's KL.

    `named` is the metric, of one task or the other.
    """

    named: str
    share: Fraction

    @property
    def task(self) -> Task:
        return _RECOVERED[self.named]

    @property
    def slug(self) -> str:
        return f"recovered-{_number(self.share * 100)}"

    @property
    def words(self) -> str:
        return f"has {self.named} ≥ {float(self.share):g}"

    def pick(self, front: Sequence[Training]) -> Training | None:
        inside = [one for one in front if _recovered(one) >= float(self.share)]
        return min(inside, key=lambda one: (point_of(one)[0], one.number), default=None)


@dataclass(frozen=True)
class TrainingRule:
    """The finished training of this id, on a front or not; its first digits will do where no other id has them."""

    training_id: str


FrontRule = KneeRule | SizeRule | RecoveredRule
Rule = FrontRule | TrainingRule


def parse_rule(text: str) -> Rule:
    """The rule that a person wrote: `knee`, `l0=16`, `kl_recovered>=0.95` or `training=ID`.

    Raises InputError for anything else.
    """
    text = "".join(text.split())
    found = _RULE.fullmatch(text)
    if found is None:
        raise InputError(f"--rule: {text[:80]!r} is none; write {RULES}")
    size, most, recovered, share, training = found.group("size", "most", "recovered", "share", "training")
    if most is not None and Fraction(most) < 1:
        raise InputError(f"--rule: {text}: fronts begin at {size} 1; write {size}=1 or more")
    if share is not None and not 0 < Fraction(share) <= 1:
        raise InputError(f"--rule: {text}: {recovered} is a share; write a number up to 1, for example 0.95")
    if most is not None:
        return SizeRule(size, Fraction(most))
    if share is not None:
        return RecoveredRule(recovered, Fraction(share))
    return KneeRule() if training is None else TrainingRule(training)


def apply_rule(statuses: Sequence[StudyStatus], rule: Rule, layer: int | None = None) -> list[Choice]:
    """What `rule` picks from the front of each study that the sweep asks for now, or of that of one layer.

    Raises InputError where a front has nothing that meets the rule, and where there is no such layer or training.
    """
    if isinstance(rule, TrainingRule):
        return [_choose_training(statuses, rule, layer)]
    current = [status for status in statuses if status.study.is_current]
    wanted = [status for status in current if layer in (None, status.study.layer)]
    if not wanted:
        layers = ", ".join(str(status.study.layer) for status in current) or "none"
        raise InputError(f"--layer: the sweep has no such layer as of its latest start; it has {layers}")
    if isinstance(rule, SizeRule | RecoveredRule) and any(status.study.task != rule.task for status in wanted):
        raise InputError(f"--rule: {rule.named} is not what this sweep's fronts weigh; write {RULES}")
    picked = [(status, rule.pick(status.front)) for status in wanted]
    if misses := [_what_there_is(status, rule) for status, training in picked if training is None]:
        raise InputError("; ".join(misses))
    return [Choice(status, training, rule.slug) for status, training in picked if training is not None]


def _choose_training(statuses: Sequence[StudyStatus], rule: TrainingRule, layer: int | None) -> Choice:
    status, training = find_finished(statuses, rule.training_id, "--rule")
    if layer not in (None, training.layer):
        raise InputError(f"--layer: training {training.training_id} is of layer {training.layer}, not {layer}")
    return Choice(status, training, f"training-{training.training_id[:_DIGITS_OF_ID]}")


def find_finished(statuses: Sequence[StudyStatus], wanted: str, option: str) -> tuple[StudyStatus, Training]:
    """The finished training of an id or its first digits, and its study.

    Raises InputError, which names `option`, where it is none, several or has not finished.
    """
    pairs = [(status, one) for status in statuses for one in status.trainings if one.training_id.startswith(wanted)]
    exact = [pair for pair in pairs if pair[1].training_id == wanted]
    if not wanted or len(exact or pairs) != 1:
        several = f"{len(pairs)} trainings begin with {wanted}"
        problem = several if pairs else f"the sweep has no training {wanted[:80]}"
        raise InputError(f"{option}: {problem}; {WHERE_IDS_ARE}")
    ((status, training),) = exact or pairs
    if training.state != "finished":
        raise InputError(
            f"{option}: training {training.training_id} is {training.state}; only finished ones have a dictionary"
        )
    return status, training


def _what_there_is(status: StudyStatus, rule: FrontRule) -> str:
    front = status.front
    # whatever is on a front, it has a knee
    if isinstance(rule, KneeRule) or not front:
        return (
            f"{status.title}: the front is empty; nothing has finished inside the feasible box yet "
            "(--rule training=ID takes one outside)"
        )
    recovered, sizes = [_recovered(one) for one in front], [point_of(one)[0] for one in front]
    found = front[0].objectives
    offered = f"{found.size} {sizes[0]:.6g} to {sizes[-1]:.6g}"
    offered += f" and {found.recovered} {min(recovered):.4g} to {max(recovered):.4g}"
    return f"{status.title}: no training on the front {rule.words}; it offers {offered}"


def _recovered(training: Training) -> float:
    return training.metrics[training.objectives.recovered]


def _number(value: Fraction) -> str:
    """As decimal digits, with `_` for the point: aliases hold letters, digits, `-` and `_` only."""
    return f"{float(value):.6f}".rstrip("0").rstrip(".").replace(".", "_")
