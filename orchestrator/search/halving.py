"""Multi-objective successive halving: which trainings go on at a rung. Pure decisions.

Trainings that reached the same rung are ranked by feasibility, then by non-dominated sorting, ties by crowding distance
(NSGA-II, Deb et al. 2002). The best 1/η go on, asynchronously as in ASHA (Li et al. 2020): whoever arrives is compared
with all that arrived before, and nobody waits.
"""

import math
from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import median

from orchestrator.pareto import front

# Of the rungs tried in replays of benchmarks/search_table.sqlite.gz, those that were ahead at a fifth of its tokens.
DEFAULT_SHARES = (1 / 18, 1 / 6, 1 / 3)


@dataclass(frozen=True)
class Halving:
    """At each rung, a number of steps, the best 1/`eta` of a study's trainings of one family go on."""

    eta: float
    rungs: tuple[int, ...]

    def share_trained(self, steps: int) -> float:
        """The share of whole trainings' steps that remains when at every rung exactly 1/η go on."""
        ends = [*self.rungs, steps]
        stretches = [end - begun for begun, end in zip([0, *self.rungs], ends, strict=True)]
        return sum(stretch / self.eta**passed for passed, stretch in enumerate(stretches)) / steps


@dataclass(frozen=True)
class AtRung:
    """What a training had reached at a rung: kl in nats, l0 in features per token, and whether they are in the box."""

    training_id: str
    kl: float
    l0: float
    feasible: bool

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.kl) and math.isfinite(self.l0)


def survivors(asking: Collection[str], ranked: Sequence[AtRung], eta: float) -> set[str]:
    """Which of the trainings `asking` go on, given the `ranking` of all that arrived at the rung, these included.

    The best ⌈n/η⌉ of the n that arrived, and the whole feasible front: another l0 is no worse an answer, and without
    them fronts end up with holes. A training whose numbers are not finite never goes on.
    """
    finite = [one for one in ranked if one.is_finite]
    on_front = front([(one.l0, one.kl) for one in finite if one.feasible])
    kept = max(math.ceil(len(ranked) / eta), len(on_front))
    return {one.training_id for one in finite[:kept]} & set(asking)


def ranking(arrived: Sequence[AtRung]) -> list[AtRung]:
    """Best first: feasible before infeasible before not finite; within those front after front, the lonely first.

    The answer does not depend on the order of `arrived`.
    """
    ordered = sorted(arrived, key=lambda one: one.training_id)
    finite = [one for one in ordered if one.is_finite]
    ranked = []
    for feasible in (True, False):
        group = [one for one in finite if one.feasible == feasible]
        places = _places(group)
        for members in fronts(group):
            distance = _crowding(members, places)
            ranked += sorted(members, key=lambda one: (-distance[one.training_id], one.training_id))
    return ranked + [one for one in ordered if not one.is_finite]


def fronts(trainings: Sequence[AtRung]) -> list[list[AtRung]]:
    """The front, then the front of what is left, and so on, by ascending l0. All values are finite.

    Jensen's sweep for two objectives (2003), n log n: in ascending order of l0, a training belongs to the first front
    whose latest member does not dominate it, and the latest members' kl ascend from front to front.
    """
    found: list[list[AtRung]] = []
    for one in sorted(trainings, key=lambda one: (one.l0, one.kl)):
        at = bisect_left(found, True, key=lambda members: not _dominates(members[-1], one))
        if at == len(found):
            found.append([])
        found[at].append(one)
    return found


def _dominates(one: AtRung, other: AtRung) -> bool:
    return one.l0 <= other.l0 and one.kl <= other.kl and (one.l0, one.kl) != (other.l0, other.kl)


def crowding(members: Sequence[AtRung], group: Sequence[AtRung]) -> dict[str, float]:
    """Training id -> how far its neighbours on the front `members` are apart, over both objectives.

    Infinite at the ends. Distances are between ranks within the whole `group`, so that no objective's scale matters.
    """
    return _crowding(members, _places(group))


# training id -> the ranks of its kl and its l0 among the different values of a group
_Places = dict[str, tuple[int, int]]


def _places(group: Sequence[AtRung]) -> _Places:
    kl, l0 = ({value: place for place, value in enumerate(sorted(set(values)))} for values in _columns(group))
    return {one.training_id: (kl[one.kl], l0[one.l0]) for one in group}


def _columns(group: Sequence[AtRung]) -> tuple[list[float], list[float]]:
    return [one.kl for one in group], [one.l0 for one in group]


def _crowding(members: Sequence[AtRung], places: _Places) -> dict[str, float]:
    distance = dict.fromkeys((one.training_id for one in members), 0.0)
    for objective in (0, 1):
        line = sorted({places[training_id][objective] for training_id in distance})
        for training_id in distance:
            at = bisect_left(line, places[training_id][objective])
            at_the_end = at in (0, len(line) - 1)
            distance[training_id] += math.inf if at_the_end else line[at + 1] - line[at - 1]
    return distance


@dataclass(frozen=True)
class FromRungToEnd:
    """A finished training's values at a rung and at its end, (kl, l0) each."""

    at_rung: tuple[float, float]
    at_end: tuple[float, float]


def extrapolated(values: tuple[float, float], finished: Sequence[FromRungToEnd]) -> tuple[float, float]:
    """The (kl, l0) that a stopped training would have ended at: times the median ratio end/rung of the `finished`."""
    kl, l0 = values
    return kl * _median_ratio(finished, 0), l0 * _median_ratio(finished, 1)


def _median_ratio(finished: Sequence[FromRungToEnd], objective: int) -> float:
    """End/rung of (0) kl or (1) l0; 1 where nothing can tell."""
    pairs = [(one.at_rung[objective], one.at_end[objective]) for one in finished]
    return median([end / at_rung for at_rung, end in pairs if at_rung > 0] or [1.0])


def default_rungs(steps: int) -> tuple[int, ...]:
    """Rungs at an eighteenth, a sixth and a third of a training's steps."""
    rungs = {max(1, round(steps * share)) for share in DEFAULT_SHARES}
    return tuple(sorted(rung for rung in rungs if rung < steps))
