"""Which trainings go on at a rung: the decisions against brute force, and what must not matter to them."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.search.halving import (
    AtRung,
    FromRungToEnd,
    Halving,
    crowding,
    default_rungs,
    extrapolated,
    fronts,
    ranking,
    survivors,
)

# few levels, so that equal values and deep fronts are common
KL = st.sampled_from([0.01, 0.02, 0.05, 0.1, 0.2, 0.4])
L0 = st.sampled_from([2.0, 4.0, 8.0, 16.0, 64.0])
NOT_FINITE = st.sampled_from([math.nan, math.inf])


@st.composite
def arrivals(draw: st.DrawFn, finite: bool = False, least: int = 0) -> list[AtRung]:
    kl, l0 = (KL, L0) if finite else (KL | NOT_FINITE, L0 | NOT_FINITE)
    values = draw(st.lists(st.tuples(kl, l0, st.booleans()), min_size=least, max_size=16))
    return [AtRung(f"t{number:02d}", *value) for number, value in enumerate(values)]


def dominates(one: AtRung, other: AtRung) -> bool:
    return one.kl <= other.kl and one.l0 <= other.l0 and (one.kl, one.l0) != (other.kl, other.l0)


def depth(one: AtRung, among: Sequence[AtRung]) -> int:
    """On which front a training is: the longest chain of trainings that each dominate the next, and the last it."""
    return max((1 + depth(other, among) for other in among if dominates(other, one)), default=0)


def ids(trainings: Sequence[AtRung]) -> list[str]:
    return [one.training_id for one in trainings]


@given(arrivals(finite=True))
def test_fronts_are_those_of_brute_force(arrived: list[AtRung]) -> None:
    found = {one.training_id: number for number, members in enumerate(fronts(arrived)) for one in members}
    assert found == {one.training_id: depth(one, arrived) for one in arrived}


@given(arrivals())
def test_the_ranking_puts_groups_before_fronts_before_crowding(arrived: list[AtRung]) -> None:
    ranked = ranking(arrived)
    assert sorted(ids(ranked)) == sorted(ids(arrived))
    finite = [one for one in ranked if one.is_finite]
    # not finite last, infeasible before that
    assert ranked[: len(finite)] == finite
    assert [one.feasible for one in finite] == sorted((one.feasible for one in finite), reverse=True)
    for feasible in (True, False):
        group = [one for one in finite if one.feasible == feasible]
        depths = [depth(one, group) for one in group]
        assert depths == sorted(depths)
        for level in set(depths):
            members = [one for one, at in zip(group, depths, strict=True) if at == level]
            distances = [crowding(members, group)[one.training_id] for one in members]
            assert distances == sorted(distances, reverse=True)


@given(arrivals(), st.randoms(use_true_random=False), st.sampled_from([2, 3, 4]))
def test_the_order_of_arrival_does_not_matter(arrived: list[AtRung], random: object, eta: int) -> None:
    shuffled = list(arrived)
    random.shuffle(shuffled)
    assert survivors(ids(arrived), ranking(arrived), eta) == survivors(ids(arrived), ranking(shuffled), eta)


@given(arrivals(), st.sampled_from([2, 3, 4]))
def test_scales_do_not_matter(arrived: list[AtRung], eta: int) -> None:
    stretched = [replace(one, kl=one.kl * 1e6, l0=one.l0**3) for one in arrived]
    assert ids(ranking(arrived)) == ids(ranking(stretched))
    assert survivors(ids(arrived), ranking(arrived), eta) == survivors(ids(arrived), ranking(stretched), eta)


@given(arrivals(), st.sampled_from([2, 3, 4]))
def test_the_promised_share_and_the_feasible_front_go_on(arrived: list[AtRung], eta: int) -> None:
    kept = survivors(ids(arrived), ranking(arrived), eta)
    finite = [one for one in arrived if one.is_finite]
    feasible = [one for one in finite if one.feasible]
    on_front = {one.training_id for one in feasible if depth(one, feasible) == 0}
    assert on_front <= kept <= set(ids(finite))
    assert len(kept) == max(min(math.ceil(len(arrived) / eta), len(finite)), len(on_front))


@given(arrivals(), st.sampled_from([2, 3, 4]))
def test_nobody_goes_on_in_the_place_of_one_that_dominates_it(arrived: list[AtRung], eta: int) -> None:
    kept = survivors(ids(arrived), ranking(arrived), eta)
    for one in arrived:
        for better in arrived:
            alike = one.feasible == better.feasible and one.is_finite and better.is_finite
            if alike and dominates(better, one) and one.training_id in kept:
                assert better.training_id in kept


@given(arrivals(least=1), st.data())
def test_only_those_that_ask_go_on_and_it_changes_nothing(arrived: list[AtRung], data: st.DataObject) -> None:
    asking = data.draw(st.sets(st.sampled_from(ids(arrived))))
    assert survivors(asking, ranking(arrived), 3) == survivors(ids(arrived), ranking(arrived), 3) & asking


def test_crowding_prefers_the_lonely_member_of_a_front() -> None:
    line = [AtRung(str(n), kl, l0, True) for n, (kl, l0) in enumerate([(6, 1), (5, 2), (3, 5), (2, 6), (1, 7)])]
    behind = [AtRung(f"b{n}", kl, l0, True) for n, (kl, l0) in enumerate([(7, 3), (7, 4), (4, 8)])]
    distance = crowding(line, line + behind)
    # ranks among all: kl 6 5 3 2 1, l0 1 2 5 6 7
    assert distance == {"0": math.inf, "1": 3 + 4, "2": 3 + 4, "3": 2 + 2, "4": math.inf}


def test_values_are_extrapolated_by_the_median_ratio() -> None:
    finished = [FromRungToEnd((0.2, 100.0), (0.1 * n, 50.0)) for n in (1, 2, 4)]
    assert extrapolated((0.3, 80.0), finished) == pytest.approx((0.3, 40.0))
    assert extrapolated((0.3, 80.0), []) == (0.3, 80.0)
    # a collapsed training has no ratio of l0
    assert extrapolated((0.3, 80.0), [FromRungToEnd((0.2, 0.0), (0.1, 0.0))]) == pytest.approx((0.15, 80.0))


def test_default_rungs_are_inside_a_training() -> None:
    assert default_rungs(900) == (50, 150, 300)
    # nothing is compared before the first step, nor at the end
    assert default_rungs(6) == (1, 2)
    assert default_rungs(1) == ()


def test_the_share_that_is_trained() -> None:
    # all to a ninth, a third of them to a third, a ninth to the end
    assert Halving(3, (100, 300)).share_trained(900) == pytest.approx(1 / 9 + 2 / 27 + 2 / 27)
    assert Halving(2, ()).share_trained(10) == 1
