import itertools
import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.ledger import Ledger, Training
from orchestrator.pareto import feasible, front, front_trainings, hypervolume, knee, knee_index

# few distinct values, so that ties and duplicates are frequent
coarse = st.integers(1, 8).map(float)
coordinate = st.one_of(coarse, st.floats(1e-3, 1e3))
points_lists = st.lists(st.tuples(coordinate, coordinate), max_size=12)
REFERENCE = (2000.0, 2000.0)


def dominates(first: tuple[float, float], second: tuple[float, float]) -> bool:
    no_worse = first[0] <= second[0] and first[1] <= second[1]
    return no_worse and (first[0] < second[0] or first[1] < second[1])


def brute_force_front(points: list[tuple[float, float]]) -> list[int]:
    return [
        index
        for index, point in enumerate(points)
        if not any(map(math.isnan, point)) and not any(dominates(other, point) for other in points)
    ]


def brute_force_hypervolume(points: list[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Inclusion-exclusion over the boxes between each point and the reference."""
    area = 0.0
    for size in range(1, len(points) + 1):
        for chosen in itertools.combinations(points, size):
            width = math.log2(reference[0]) - max(math.log2(l0) for l0, _ in chosen)
            height = math.log2(reference[1]) - max(math.log2(kl) for _, kl in chosen)
            area += (-1) ** (size + 1) * width * height
    return area


@given(points_lists)
def test_front_equals_brute_force(points: list[tuple[float, float]]) -> None:
    assert front(points) == brute_force_front(points)


@given(st.lists(st.tuples(st.one_of(coarse, st.just(math.nan)), coarse), max_size=10))
def test_points_with_nan_are_on_no_front_and_hide_nothing(points: list[tuple[float, float]]) -> None:
    assert front(points) == brute_force_front(points)


@given(points_lists, st.randoms(use_true_random=False))
def test_front_does_not_depend_on_the_order(points: list[tuple[float, float]], rng: random.Random) -> None:
    shuffled = rng.sample(points, len(points))
    assert sorted(shuffled[i] for i in front(shuffled)) == sorted(points[i] for i in front(points))


@given(points_lists)
def test_units_do_not_matter(points: list[tuple[float, float]]) -> None:
    assert front([(x * 2, y / 4) for x, y in points]) == front(points)


def test_equal_points_are_all_on_the_front() -> None:
    assert front([(1.0, 2.0), (3.0, 3.0), (1.0, 2.0), (2.0, 1.0)]) == [0, 2, 3]


@given(st.lists(st.tuples(coordinate, coordinate), max_size=7))
def test_hypervolume_equals_inclusion_exclusion(points: list[tuple[float, float]]) -> None:
    expected = brute_force_hypervolume(points, REFERENCE)
    assert hypervolume(points, REFERENCE) == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_hypervolume_equals_monte_carlo() -> None:
    rng = random.Random(0)
    points = [(2 ** rng.uniform(0, 10), 2 ** rng.uniform(-6, 1)) for _ in range(30)]
    reference = (2.0**9, 2.0**0)
    trials, hits = 20_000, 0
    for _ in range(trials):
        sample = (2 ** rng.uniform(0, 9), 2 ** rng.uniform(-6, 0))
        hits += any(l0 <= sample[0] and kl <= sample[1] for l0, kl in points)
    # six standard errors of a share at n = 20,000 are 0.021
    assert hypervolume(points, reference) / 54 == pytest.approx(hits / trials, abs=0.022)


@given(points_lists, coordinate, coordinate, st.randoms(use_true_random=False))
def test_hypervolume_ignores_order_and_dominated_points(
    points: list[tuple[float, float]], l0: float, kl: float, rng: random.Random
) -> None:
    before = hypervolume(points, REFERENCE)
    dominated = [(x * 1.5, y * 1.5) for x, y in points]
    more = rng.sample(points + dominated, 2 * len(points))
    assert hypervolume(more, REFERENCE) == pytest.approx(before, rel=1e-12)
    assert hypervolume([*points, (l0, kl)], REFERENCE) >= before - 1e-9


@pytest.mark.parametrize(
    "point", [(math.nan, 1.0), (1.0, math.nan), (0.0, 1.0), (1.0, 0.0), (2000.0, 1.0), (1.0, 3000.0)]
)
def test_points_beyond_the_reference_or_without_logarithm_add_nothing(point: tuple[float, float]) -> None:
    assert hypervolume([point], REFERENCE) == 0
    assert hypervolume([point, (1000.0, 1000.0)], REFERENCE) == pytest.approx(1.0)


@pytest.mark.parametrize("reference", [(0.0, 1.0), (1.0, math.nan), (math.inf, 1.0), (-1.0, 1.0)])
def test_a_reference_without_logarithm_is_refused(reference: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="reference"):
        hypervolume([(1.0, 1.0)], reference)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.open_study("study", "transcoder", 8, {}, model="m", corpus="c")
    return ledger


def finished(ledger: Ledger, training_id: str, l0: float | None, kl: float | None, size: int = 512) -> Training:
    """With kl_baseline = 2, so kl_recovered ≥ 0.5 means kl ≤ 1."""
    ledger.add_training("study", training_id, {"dictionary_size": size}, 1000)
    metrics = {"l0": l0, "kl": kl, "kl_recovered": None if kl is None else 1 - kl / 2}
    ledger.finish(training_id, metrics, "d", "aa")
    return ledger.training(training_id)


@pytest.mark.parametrize(
    ("l0", "kl", "expected"),
    [
        (16.0, 0.1, True),
        (1.0, 1.0, True),
        (128.0, 0.1, True),
        (128.1, 0.1, False),
        (0.99, 0.1, False),
        (0.0, 0.1, False),
        (16.0, 1.01, False),
        (16.0, None, False),
        (None, 0.1, False),
    ],
)
def test_the_feasible_box(ledger: Ledger, l0: float | None, kl: float | None, expected: bool) -> None:
    assert feasible(finished(ledger, "one", l0, kl)) is expected


def test_front_of_a_study_leaves_out_the_collapsed_the_failed_and_the_unfinished(ledger: Ledger) -> None:
    for training_id, l0, kl in [
        ("dense", 90.0, 0.05),
        ("collapsed", 0.1, 1.9),
        ("middle", 30.0, 0.1),
        ("dominated", 31.0, 0.2),
        ("sparse", 8.0, 0.3),
        ("undefined", 8.0, None),
    ]:
        finished(ledger, training_id, l0, kl)
    ledger.add_training("study", "open", {"dictionary_size": 512}, 1000)
    ledger.add_training("study", "failed", {"dictionary_size": 512}, 1000)
    ledger.fail("failed", "diverged")
    assert [t.training_id for t in front_trainings(ledger.trainings())] == ["sparse", "middle", "dense"]
    assert front_trainings([]) == []


def test_trainings_of_two_studies_have_no_common_front(ledger: Ledger) -> None:
    finished(ledger, "one", 8.0, 0.1)
    ledger.open_study("other", "transcoder", 9, {}, model="m", corpus="c")
    ledger.add_training("other", "two", {"dictionary_size": 512}, 1000)
    with pytest.raises(ValueError, match="one study"):
        front_trainings(ledger.trainings())


def distances_from_chord(points: list[tuple[float, float]]) -> list[float]:
    """Of each point of a front from the line through its ends, both coordinates' logarithms scaled to 0 … 1."""
    logs = [(math.log(l0), math.log(kl)) for l0, kl in points]
    scaled = []
    for axis in (0, 1):
        low, high = min(point[axis] for point in logs), max(point[axis] for point in logs)
        scaled.append([(point[axis] - low) / (high - low) if high > low else 0.0 for point in logs])
    corners = list(zip(*scaled, strict=True))
    (left, top), (right, bottom) = corners[0], corners[-1]
    length = math.hypot(right - left, bottom - top)
    if length == 0:
        return [0.0] * len(points)
    return [abs((right - left) * (y - top) - (x - left) * (bottom - top)) / length for x, y in corners]


@given(points_lists.filter(bool))
def test_the_knee_is_farthest_from_the_chord(points: list[tuple[float, float]]) -> None:
    on_front = sorted(points[index] for index in front(points))
    distances, found = distances_from_chord(on_front), knee_index(on_front)
    assert distances[found] >= max(distances) - 1e-9
    assert max(distances[:found], default=-1.0) < distances[found] + 1e-9, "the sparsest of several"


@given(points_lists.filter(bool), st.sampled_from([0.25, 2.0, 64.0]))
def test_units_do_not_move_the_knee(points: list[tuple[float, float]], factor: float) -> None:
    on_front = sorted(points[index] for index in front(points))
    moved = knee_index([(l0 * factor, kl / factor) for l0, kl in on_front])
    distances = distances_from_chord(on_front)
    assert distances[moved] == pytest.approx(distances[knee_index(on_front)], abs=1e-9)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(8.0, 1.0), (16.0, 0.2), (64.0, 0.1)], 1),
        # a front that bends the other way, too
        ([(8.0, 1.0), (32.0, 0.9), (64.0, 0.1)], 1),
        ([(8.0, 1.0), (64.0, 0.1)], 0),
        ([(8.0, 1.0), (8.0, 1.0)], 0),
        ([(8.0, 1.0)], 0),
        # without logarithm
        ([(0.0, 1.0), (8.0, 0.9), (9.0, 0.2), (64.0, 0.1), (70.0, 0.0)], 2),
        ([(8.0, 0.0)], 0),
    ],
)
def test_knees_by_hand(points: list[tuple[float, float]], expected: int) -> None:
    assert knee_index(points) == expected


def test_the_knee_of_a_study_is_on_its_front(ledger: Ledger) -> None:
    assert knee([]) is None
    for training_id, l0, kl in [("sparse", 8.0, 1.0), ("knee", 16.0, 0.2), ("beaten", 20.0, 0.3), ("dense", 64.0, 0.1)]:
        finished(ledger, training_id, l0, kl)
    assert knee(front_trainings(ledger.trainings())).training_id == "knee"
