import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.search.samplers import make_sampler, resolve_auto
from orchestrator.search.space import Range, contains, grid
from orchestrator.search.space_checks import validate_space
from orchestrator.search.study import Past, StudySearch
from qkmodel.hyperparameters import Hyperparameters

RATE = Range(low=1e-4, high=1e-2, log=True)
RELU = {
    "dictionary_size": Range(low=256, high=4096, log=True),
    "activation": "relu",
    "penalty": "l1",
    "sparsity_coefficient": Range(low=1e-4, high=1e-1, log=True),
    "learning_rate": RATE,
}
TOPK = {
    "dictionary_size": [512, 1024, 2048],
    "activation": "topk",
    "k": Range(low=4, high=128, log=True),
    "learning_rate": RATE,
}
LISTS = {
    "dictionary_size": [512, 1024],
    "activation": "topk",
    "k": [4, 8, 16],
    "learning_rate": 1e-3,
    "seed": [0, 1],
}
SPACES = {
    "random": [RELU | {"penalty": ["l1", "sqrt"]}, TOPK],
    "tpe": [RELU | {"penalty": ["l1", "sqrt"]}, TOPK],
    "gp": [RELU],
    "nsga2": [RELU | {"penalty": ["l1", "sqrt"]}],
    "grid": [LISTS],
}


def outcome(point):
    """(kl, l0) of a smooth pretended training: a trade-off, one best learning rate, larger is better."""
    if point["activation"] == "topk":
        l0 = point["k"]
    else:
        l0 = 2000 * 2 ** (-2.2 * math.log10(point["sparsity_coefficient"] / 1e-4))
    excess = (math.log10(point["learning_rate"]) + 2.6) ** 2 + 0.25 * math.log2(4096 / point["dictionary_size"])
    return 2 ** (excess - 0.6 * math.log2(l0)), l0


def run(search, trainings=10**9):
    """Ask and tell one after the other; what was proposed, in order."""
    proposals = []
    while len(proposals) < trainings and (point := search.ask()) is not None:
        proposals.append(point)
        search.tell(point, outcome(point))
    return proposals


def finished(points):
    return [Past(hyperparameters=point, state="finished", values=outcome(point)) for point in points]


def hypervolume(points):
    """Area dominated in (log2 l0, log2 kl), by slices, up to (2000, 2)."""
    area, lowest = 0.0, math.log2(2000)
    for kl, l0 in sorted(outcome(point) for point in points):
        if kl < 2 and math.log2(l0) < lowest:
            area += (1 - math.log2(kl)) * (lowest - math.log2(l0))
            lowest = math.log2(l0)
    return area


@pytest.mark.parametrize("sampler", SPACES)
def test_every_sampler_proposes_new_valid_trainings_up_to_the_budget(sampler):
    trainings = 12 if sampler == "grid" else 8
    proposals = run(StudySearch(SPACES[sampler], sampler, trainings, seed=1))
    assert len(proposals) == trainings
    assert len({Hyperparameters(**point) for point in proposals}) == trainings
    assert all(any(contains(each, point) for each in SPACES[sampler]) for point in proposals)


@st.composite
def topk_alternatives(draw):
    choices = st.lists(st.integers(64, 80), min_size=1, max_size=3, unique=True)
    low = draw(st.integers(1, 50))
    k = Range(low=low, high=low + draw(st.integers(1, 8)), log=draw(st.booleans()))
    rate = draw(st.floats(1e-5, 1e-2))
    rates = st.sampled_from([rate, [rate, 2 * rate], Range(low=rate, high=3 * rate)])
    return {
        "dictionary_size": draw(choices),
        "activation": "topk",
        "k": draw(st.sampled_from([k, low])),
        "learning_rate": draw(rates),
        "seed": draw(st.sampled_from([[0, 1], 5])),
    }


@settings(max_examples=40, deadline=None)
@given(
    alternatives=st.lists(topk_alternatives(), min_size=1, max_size=2, unique_by=repr),
    sampler=st.sampled_from(["auto", "random", "tpe"]),
    failing=st.integers(2, 5),
)
def test_any_space_is_searched_without_leaving_or_repeating_it(alternatives, sampler, failing):
    # Gaussian processes are too slow for this many spaces: 30 proposals of TPE, or of whatever is not `gp`.
    sampler = "tpe" if sampler == "auto" and resolve_auto(alternatives, 30) == "gp" else sampler
    search, proposals = StudySearch(alternatives, sampler, 30, seed=0), []
    while (point := search.ask()) is not None:
        proposals.append(point)
        search.tell(point, None if len(proposals) % failing == 0 else outcome(point))
    assert len({Hyperparameters(**point) for point in proposals}) == len(proposals) <= 30
    assert all(any(contains(each, point) for each in alternatives) for point in proposals)


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2", "grid", "auto"])
def test_a_finite_space_is_exhausted_exactly_once(sampler):
    proposals = run(StudySearch([LISTS], sampler, 100, seed=3))
    assert {Hyperparameters(**point) for point in proposals} == {Hyperparameters(**p) for p in grid([LISTS])}
    assert len(proposals) == 12


def test_whole_number_ranges_are_finite_too():
    narrow = LISTS | {"k": Range(low=1, high=9), "dictionary_size": 64, "seed": 0}
    assert sorted(point["k"] for point in run(StudySearch([narrow], "tpe", 100, seed=0))) == list(range(1, 10))


def test_a_space_of_one_training():
    fixed = {"dictionary_size": [64], "activation": "topk", "k": 4, "learning_rate": 1e-3}
    for sampler in ("auto", "tpe", "random"):
        assert run(StudySearch([fixed], sampler, 5, seed=0)) == [{**fixed, "dictionary_size": 64, "seed": 0}]


@pytest.mark.parametrize("sampler", ["grid", "random", "tpe", "nsga2"])
def test_rebuilt_from_history_it_goes_on_as_if_never_interrupted(sampler):
    trainings = 12 if sampler == "grid" else 60
    whole = run(StudySearch(SPACES[sampler], sampler, trainings, seed=7))
    for done in (0, 1, 6, 11, trainings - 5):
        rebuilt = StudySearch(SPACES[sampler], sampler, trainings, seed=7, history=finished(whole[:done]))
        assert run(rebuilt) == whole[done:]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_alternatives_that_overlap_are_rebuilt_as_they_were(sampler):
    overlapping = [TOPK, TOPK | {"k": Range(low=8, high=256, log=True), "dictionary_size": [512, 1024, 4096]}]
    whole = run(StudySearch(overlapping, sampler, 40, seed=3))
    for done in (5, 15, 30):
        rebuilt = StudySearch(overlapping, sampler, 40, seed=3, history=finished(whole[:done]))
        assert run(rebuilt) == whole[done:]


def test_gp_rebuilt_twice_proposes_the_same():
    past = run(StudySearch([RELU], "random", 8, seed=0))
    first, second = (StudySearch([RELU], "gp", 20, seed=0, history=finished(past)).ask() for _ in range(2))
    assert first == second


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_the_order_of_keys_does_not_matter(sampler):
    shuffled = [dict(random.Random(0).sample(list(each.items()), len(each))) for each in SPACES[sampler]]
    past = run(StudySearch(SPACES[sampler], "random", 30, seed=0))
    turned = [dict(reversed(point.items())) for point in past]
    plain = StudySearch(SPACES[sampler], sampler, 60, seed=0, history=finished(past))
    other = StudySearch(shuffled, sampler, 60, seed=0, history=finished(turned))
    assert run(plain) == run(other)


def test_the_seed_matters():
    assert StudySearch([RELU], "random", 5, seed=0).ask() != StudySearch([RELU], "random", 5, seed=1).ask()


def test_open_and_failed_trainings_count_and_are_not_proposed_again():
    points = grid([LISTS])
    history = [
        Past(hyperparameters=points[0], state="open"),
        Past(hyperparameters=points[1], state="failed"),
        Past(hyperparameters=points[2], state="finished", values=(0.1, 4.0)),
    ]
    search = StudySearch([LISTS], "tpe", 5, seed=0, history=history)
    proposals = run(search)
    assert len(proposals) == 2 and not any(point in points[:3] for point in proposals)
    search.tell(points[0], (0.2, 8.0))
    # once told, always told: a stopped training that is taken up again comes with other values
    search.tell(points[0], (0.1, 8.0))
    assert sum(trial.state.is_finished() for trial in search._study.trials) == 5
    with pytest.raises(KeyError):
        search.tell(next(point for point in points if point not in [*points[:3], *proposals]), (0.2, 8.0))


def test_history_outside_the_space_does_not_count():
    elsewhere = [point | {"k": 32} for point in grid([LISTS])]
    assert len(run(StudySearch([LISTS], "random", 4, seed=0, history=finished(elsewhere)))) == 4


def test_an_open_training_outside_the_space_can_be_told():
    elsewhere = grid([LISTS])[0] | {"k": 32}
    search = StudySearch([LISTS], "tpe", 4, seed=0, history=[Past(hyperparameters=elsewhere, state="open")])
    search.tell(elsewhere, (0.1, 32.0))
    assert run(search) == run(StudySearch([LISTS], "tpe", 4, seed=0))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "dictionary_size": st.lists(st.sampled_from([64, 128, 256]), min_size=1, unique=True),
                "k": st.lists(st.sampled_from([4, 8, 16]), min_size=1, unique=True),
                "seed": st.lists(st.integers(0, 3), min_size=1, unique=True),
            }
        ),
        min_size=1,
        max_size=2,
    ),
    st.data(),
)
def test_a_grid_visits_what_its_history_lacks_once_and_in_order(lists, data):
    alternatives = [{"activation": "topk", "learning_rate": 1e-3, **one} for one in lists]
    points = grid(alternatives)
    tried = data.draw(st.lists(st.sampled_from(points), unique_by=lambda point: tuple(point.items())))
    search = StudySearch(alternatives, "grid", len(points), 0, finished(tried))
    assert run(search) == [point for point in points if point not in tried]
    assert search.ask() is None


def test_a_grid_is_finished_after_its_points_have_been_moved():
    coarse, fine = ([RELU | {"dictionary_size": 512, "learning_rate": 1e-3}] for _ in range(2))
    coarse[0]["sparsity_coefficient"] = Range(low=1e-3, high=1e-1, log=True, points=3)
    fine[0]["sparsity_coefficient"] = Range(low=1e-3, high=1e-1, log=True, points=4)
    past = run(StudySearch(coarse, "grid", 4, seed=0))
    added = run(StudySearch(fine, "grid", 4, seed=0, history=finished(past)))
    assert [point["sparsity_coefficient"] for point in added] == [0.00464159, 0.0215443]


@pytest.mark.parametrize("bad", [None, (math.nan, 4.0), (0.1, math.inf)])
def test_a_failed_training_teaches_the_sampler_nothing(bad):
    *points, last = run(StudySearch([RELU], "random", 25, seed=0))

    def proposals(end, values=None):
        """Asked for after the last training has ended one way or another."""
        search = StudySearch([RELU], "tpe", 60, seed=0, history=[*finished(points), end])
        if end.state == "open":
            search.tell(last, values)
        return [search.ask() for _ in range(5)]

    failed = proposals(Past(hyperparameters=last, state="failed"))
    assert proposals(Past(hyperparameters=last, state="open"), bad) == failed
    assert proposals(Past(hyperparameters=last, state="open"), (1e-3, 2.0)) != failed


def test_zero_kl_and_zero_l0_can_be_told():
    search = StudySearch([RELU], "tpe", 8, seed=0)
    for values in [(0.0, 5.0), (2.0, 0.0), (0.1, 0.5), (0.2, 9.0), (0.3, 7.0)]:
        search.tell(search.ask(), values)
    assert search.ask() is not None


def test_infeasible_trainings_are_avoided():
    """Below a coefficient of 3e-3 everything is best by its values and outside the box."""
    points = run(StudySearch([RELU], "random", 40, seed=0))

    def history(feasible):
        return [Past(point, "finished", outcome(point), feasible(point)) for point in points]

    def share_inside(history):
        search = StudySearch([RELU], "tpe", 80, seed=0, history=history)
        asked = [search.ask() for _ in range(40)]
        return statistics.mean(point["sparsity_coefficient"] >= 3e-3 for point in asked)

    told = share_inside(history(lambda point: point["sparsity_coefficient"] >= 3e-3))
    untold = share_inside(history(lambda point: True))
    assert told > untold + 0.1


def median_hypervolume(sampler, space, trainings, seeds):
    return statistics.median(hypervolume(run(StudySearch(space, sampler, trainings, seed))) for seed in range(seeds))


@pytest.mark.parametrize(
    ("sampler", "space", "trainings"),
    [("tpe", SPACES["random"], 50), ("tpe", [RELU], 50), ("nsga2", [RELU], 150)],
)
def test_learning_samplers_beat_chance(sampler, space, trainings):
    chance = median_hypervolume("random", space, trainings, seeds=5)
    assert median_hypervolume(sampler, space, trainings, seeds=5) > chance + 0.3


@pytest.mark.system
@pytest.mark.slow
def test_gaussian_processes_beat_chance():
    chance = median_hypervolume("random", [RELU], 14, seeds=3)
    assert median_hypervolume("gp", [RELU], 14, seeds=3) > chance + 0.3


def test_auto():
    validate_space([RELU], "auto", 40)
    assert resolve_auto([LISTS], 12) == "grid"
    assert resolve_auto([LISTS], 11) == "tpe"
    assert resolve_auto([RELU], 40) == "gp"
    assert resolve_auto([RELU], 101) == "tpe"
    assert resolve_auto([RELU | {"penalty": ["l1", "sqrt"]}], 40) == "tpe"
    assert resolve_auto([RELU], 1000) == "nsga2"
    assert resolve_auto([RELU, TOPK], 1000) == "tpe"
    assert StudySearch([LISTS], "auto", 12, seed=0).sampler == "grid"


def test_an_unknown_sampler_is_refused():
    with pytest.raises(ValueError, match="bayes"):
        make_sampler("bayes", 10, 0)
