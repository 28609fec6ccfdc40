import itertools
import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.ledger import Ledger, Training
from orchestrator.pareto import feasible, front, front_trainings, hypervolume, knee

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


def brute_force_distances(points: list[tuple[float, float]]) -> list[float]:
    """How far each point lies below the chord of its ends, in units of the box of the points."""
    logs = [(math.log2(l0), math.log2(kl)) for l0, kl in points]
    (left, top), (right, bottom) = min(logs), max(logs)
    boxed = [((x - left) / (right - left), (y - bottom) / (top - bottom)) for x, y in logs]
    # of the line from (0, 1) to (1, 0): the cross product with its direction, over its length
    return [(1 * (1 - y) - 1 * x) / math.sqrt(2) for x, y in boxed]


@given(points_lists)
def test_the_knee_is_farthest_below_the_chord(points: list[tuple[float, float]]) -> None:
    members = [points[index] for index in front(points)]
    if len(set(members)) < 3:
        return
    found, distances = members[knee(members)], brute_force_distances(members)
    best = max(0.0, *distances)
    assert distances[members.index(found)] >= best - 1e-9
    if best < 1e-12:
        assert found[1] == min(kl for _, kl in members)


@given(points_lists.filter(bool), st.randoms(use_true_random=False))
def test_the_knee_does_not_depend_on_order(points: list[tuple[float, float]], rng: random.Random) -> None:
    members = [points[index] for index in front(points)]
    shuffled = rng.sample(members, len(members))
    assert shuffled[knee(shuffled)] == members[knee(members)]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(8.0, 0.5)], 0),
        ([(8.0, 0.5), (16.0, 0.25)], 1),
        ([(16.0, 0.25), (8.0, 0.5)], 0),
        # an elbow at 16
        ([(8.0, 0.8), (16.0, 0.1), (32.0, 0.09), (64.0, 0.08)], 1),
        # halvings for doublings all the way: no knee, so the lowest KL
        ([(8.0, 0.8), (16.0, 0.4), (32.0, 0.2)], 2),
        # all above the chord
        ([(8.0, 0.8), (16.0, 0.79), (32.0, 0.2)], 2),
        ([(8.0, 0.0), (8.0, 0.5)], 1),
    ],
)
def test_knees(points: list[tuple[float, float]], expected: int) -> None:
    assert knee(points) == expected


@pytest.mark.parametrize("points", [[], [(0.0, 1.0)], [(1.0, 0.0)]])
def test_no_point_has_no_knee(points: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="knee"):
        knee(points)


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
