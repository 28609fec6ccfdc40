"""Fronts, their knee, and hypervolume of (l0, kl) points; both coordinates are minimised.

Of pair masks l0 is how many pairs are kept, and kl that of the masked pattern: see `objectives`.
"""

import math
from collections.abc import Mapping, Sequence

from orchestrator.ledger import Training

MIN_KL_RECOVERED = 0.5
MIN_L0 = 1.0
MAX_L0_SHARE = 0.25

Point = tuple[float, float]


def front(points: Sequence[Point]) -> list[int]:
    """Indices, ascending, of the points that no other point dominates.

    A point dominates another when it is at most as large in both coordinates and smaller in one; so of equal
    points all are on the front. Points with a NaN are on no front and dominate nothing.
    """
    by_first = sorted(
        (index for index, point in enumerate(points) if not any(map(math.isnan, point))),
        key=lambda index: points[index],
    )
    kept: list[int] = []
    for index in by_first:
        # sorted by first, then second coordinate: only the last point kept can dominate this one
        if not kept or points[index][1] < points[kept[-1]][1] or points[index] == points[kept[-1]]:
            kept.append(index)
    return sorted(kept)


def size_cap(training: Training) -> float:
    """The largest l0 that is still called sparse: a quarter of the dictionary, of both sides' mean size like l0.

    Masks choose from few candidates: any number of those is.
    """
    if training.task == "pair_mask":
        return math.inf
    size = training.hyperparameters["dictionary_size"]
    return MAX_L0_SHARE * (size + (training.hyperparameters.get("key_dictionary_size") or size)) / 2


def final_values(training: Training) -> tuple[float, float] | None:
    """(kl, l0) of a finished training; None where one of them is undefined."""
    kl, size = (training.metrics.get(name) for name in (training.objectives.kl, training.objectives.size))
    return None if kl is None or size is None else (kl, size)


def feasible(training: Training) -> bool:
    """Whether a finished training is inside the box in which fronts are drawn.

    kl_recovered ≥ 0.5 and 1 ≤ l0 ≤ dictionary_size / 4, and what the sweep file's constraints ask for. Without it a
    collapsed dictionary (l0 → 0) would be on every front. Of masks: kl_masked_recovered ≥ 0.5 and at least one pair.
    """
    return training.state == "finished" and within_box(training, training.metrics)


def within_box(training: Training, metrics: Mapping[str, float | None]) -> bool:
    """Whether `metrics` of a training, final or at a rung, are inside the box and meet its study's constraints.

    A rung measures less than the end: constraints on what it does not measure are let pass.
    """
    found = training.objectives
    needed = [metrics.get(name) for name in (found.kl, found.size, found.recovered)]
    if any(value is None for value in needed):
        return False
    _, size, recovered = needed
    if recovered < MIN_KL_RECOVERED or not MIN_L0 <= size <= size_cap(training):
        return False
    return all(_meets(metrics[name], *bounds) for name, bounds in training.constraints.items() if name in metrics)


def _meets(value: float | None, least: float | None, largest: float | None) -> bool:
    if value is None:
        return False
    return (least is None or value >= least) and (largest is None or value <= largest)


def front_trainings(trainings: Sequence[Training]) -> list[Training]:
    """The front of one study, by ascending l0; empty where nothing finished inside the box.

    Raises ValueError for trainings of several studies: their KL is not comparable.
    """
    if len({training.study_id for training in trainings}) > 1:
        raise ValueError("a front is of one study: KL of different layers is not comparable")
    candidates = [training for training in trainings if feasible(training)]
    points = [point_of(training) for training in candidates]
    members = [candidates[index] for index in front(points)]
    return sorted(members, key=lambda training: (point_of(training)[0], training.number))


def point_of(training: Training) -> Point:
    """(l0, kl) of a training that has both."""
    return training.metrics[training.objectives.size], training.metrics[training.objectives.kl]


def knee(points: Sequence[Point]) -> int:
    """Index of the point of a front, given as (l0, kl), at which more l0 begins to buy less kl.

    The one farthest below the chord between the front's ends in (log2 l0, log2 kl), both normalised to the front's box
    (Kneedle: Satopaa, Albrecht, Irwin & Raghavan 2011). Where there is none, as among one or two points, and of equally
    far ones, the one of lowest kl; of equal points the first. Raises ValueError where no point has a logarithm.
    """
    inside = [(index, math.log2(l0), math.log2(kl)) for index, (l0, kl) in enumerate(points) if l0 > 0 and kl > 0]
    if not inside:
        raise ValueError("a knee needs a point of positive l0 and kl")
    left, right = min(x for _, x, _ in inside), max(x for _, x, _ in inside)
    low, high = min(y for _, _, y in inside), max(y for _, _, y in inside)

    def below_chord(x: float, y: float) -> float:
        # the chord runs from (0, 1) to (1, 0) of the box; at the ends rounding must not decide
        if right == left or high == low or x in (left, right):
            return 0.0
        return 1 - (x - left) / (right - left) - (y - low) / (high - low)

    index, _, _ = min(inside, key=lambda point: (-max(below_chord(*point[1:]), 0.0), point[2], point[0]))
    return index


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Area in (log2 l0, log2 kl) that the points dominate, up to `reference` = (l0 cap, kl_baseline).

    One unit is one halving of l0 times one halving of kl. Points that are not better than the reference in
    both coordinates, or have no logarithm, add nothing. Raises ValueError for a reference without logarithm.
    """
    if not all(value > 0 and math.isfinite(value) for value in reference):
        raise ValueError(f"the reference point must be positive and finite, not {reference}")
    inside = [(math.log2(l0), math.log2(kl)) for l0, kl in points if 0 < l0 < reference[0] and 0 < kl < reference[1]]
    right, top = math.log2(reference[0]), math.log2(reference[1])
    area = 0.0
    # sweeping l0 upwards, each front point adds the strip between its kl and that of the one before
    for index in sorted(set(front(inside)), key=lambda index: inside[index]):
        l0, kl = inside[index]
        area += (right - l0) * (top - kl)
        top = kl
    return area
