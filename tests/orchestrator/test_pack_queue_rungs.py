"""Packs that end at rungs, and budgets that end sweeps."""

from collections import Counter
from pathlib import Path

import pytest

from orchestrator.budget import Limits
from orchestrator.identity import training_id
from orchestrator.ledger_decisions import read_decisions
from orchestrator.pack_order import MemberReport, PackOrder
from orchestrator.pack_queue import MAX_FAILURES, history
from orchestrator.search.halving import Halving
from tests.orchestrator.pack_world import (
    GRID,
    STEPS,
    TOKENS,
    Driver,
    final,
    ids,
    progress,
    start,
    take,
    write_checkpoint,
)
from tests.orchestrator.rung_checks import assert_explained

# -- rungs

SIXTEEN = GRID | {"k": [1, 2, 4, 8, 16, 24, 32, 48]}
# the second is where its pack reports anyway
HALVING = Halving(eta=2, rungs=(2, 4))


def at_rung(training: str, steps: int, kl: float, l0: float = 16.0) -> MemberReport:
    return progress(training, steps, kl=kl, l0=l0, kl_recovered=0.9)


def reach(driver: Driver, order: PackOrder, kl: dict[str, float]) -> None:
    """The pack gets to where it is to end; `kl` of each member there."""
    for one in ids(order):
        write_checkpoint(driver.folder, one, order.last_step)
    driver.queue.record(order.pack_id, [at_rung(one, order.last_step, kl[one]) for one in ids(order)])
    driver.queue.end(order.pack_id, None)


def test_at_a_rung_the_better_half_goes_on_in_a_pack_of_its_own(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=4, halving=HALVING)
    order = take(driver)
    assert (order.steps_done, order.last_step) == (0, 2)
    one, two, three, four = ids(order)
    reach(driver, order, {one: 0.4, two: 0.1, three: 0.2, four: 0.3})
    assert {state: len(driver.ledger.trainings(state=state)) for state in ("open", "stopped")} == {
        "open": 2,
        "stopped": 2,
    }
    again = take(driver)
    assert (ids(again), again.steps_done, again.last_step) == ([two, three], 2, 4)
    reach(driver, again, {two: 0.09, three: 0.08})
    last = take(driver)
    assert (ids(last), last.steps_done, last.last_step) == ([three], 4, STEPS)
    driver.finish(last)
    assert driver.queue.next_pack() == "finished"
    assert driver.states() == {"finished": 1, "stopped": 3}
    # nobody failed, and nothing is kept of those that stopped
    assert {one.failures for one in driver.ledger.trainings()} == {0}
    assert list(sweep_folder.glob("checkpoints/*")) == []
    # what a start finds decided it does not decide again, nor train what was stopped
    assert start(sweep_folder, halving=HALVING, is_wanted=lambda one: False).queue.next_pack() == "finished"


def test_every_decision_is_explained_by_the_ledger(sweep_folder: Path) -> None:
    driver = start(sweep_folder, space=SIXTEEN, trainings=16, pack_size=3, halving=HALVING)
    kl: dict[str, float] = {}
    while (order := driver.queue.next_pack()) != "finished":
        kl |= {one: 0.01 * (1 + int(one, 16) % 7) for one in ids(order)}
        if order.last_step == STEPS:
            driver.finish(order)
        else:
            reach(driver, order, kl)
    decisions = read_decisions(driver.ledger, "late")
    assert {one.training_id for one in decisions} == {one.training_id for one in driver.ledger.trainings()}
    assert_explained(decisions, HALVING.eta)
    stopped = {one.training_id for one in decisions if not one.kept}
    assert stopped == {one.training_id for one in driver.ledger.trainings(state="stopped")}


def test_a_rung_decides_about_a_training_once_whatever_is_lost_later(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=4, halving=HALVING)
    order = take(driver)
    reach(driver, order, dict(zip(ids(order), (0.4, 0.3, 0.2, 0.1), strict=True)))
    while (order := driver.queue.next_pack()) != "finished":
        reach(driver, order, dict.fromkeys(ids(order), 0.2)) if order.last_step < STEPS else driver.finish(order)
    before = read_decisions(driver.ledger, "late")
    finished = driver.ledger.trainings(state="finished")[0].training_id
    driver.ledger.discard_result(finished, "its dictionary is gone")
    again = start(sweep_folder, pack_size=4, halving=HALVING, is_wanted=lambda one: one.training_id == finished)
    order = take(again)
    assert (ids(order), order.steps_done, order.last_step) == ([finished], 0, STEPS)
    # reports on the way fall on the rung, and decide nothing
    again.report(order, 2, kl=9.0, l0=9.0)
    again.finish(order)
    assert again.ledger.training(finished).state == "finished"
    assert read_decisions(again.ledger, "late") == before


def test_failures_before_a_rung_do_not_count_after_it(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=4, halving=HALVING)
    for _ in range(MAX_FAILURES - 1):
        driver.queue.end(take(driver).pack_id, "its worker died")
    order = take(driver)
    reach(driver, order, dict.fromkeys(ids(order), 0.1))
    assert driver.ledger.training(ids(order)[0]).failures == 0


def test_a_rung_that_a_driver_died_at_is_decided_by_the_next(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=4, halving=HALVING)
    order = take(driver)
    for one in ids(order):
        write_checkpoint(sweep_folder, one, 2)
    driver = start(sweep_folder, pack_size=4, halving=HALVING)
    again = take(driver)
    assert (ids(again), again.steps_done, again.last_step) == (ids(order), 2, 2)
    reach(driver, again, dict(zip(ids(order), (0.4, 0.3, 0.2, 0.1), strict=True)))
    assert driver.states() == {"open": 2, "stopped": 2}


def test_families_are_not_compared(sweep_folder: Path) -> None:
    space = GRID | {"activation": ["topk", "batchtopk"], "dictionary_size": 128}
    driver = start(sweep_folder, space=space, pack_size=4, halving=HALVING)
    order = take(driver)
    families = {one: driver.ledger.training(one).family for one in ids(order)}
    # every batchtopk is worse than any topk
    kl = {
        one: (0.1 if family == "topk" else 0.3) + 0.01 * place for place, (one, family) in enumerate(families.items())
    }
    reach(driver, order, kl)
    going_on = Counter(families[one.training_id] for one in driver.ledger.trainings(state="open"))
    assert going_on == {"topk": 1, "batchtopk": 1}


def test_stopped_trainings_are_told_to_the_search_as_they_would_have_ended(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=2, halving=Halving(eta=2, rungs=(2,)))
    first = take(driver)
    one, two = ids(first)
    reach(driver, first, {one: 0.4, two: 0.8})
    driver.finish(take(driver))
    second = take(driver)
    three, four = ids(second)
    reach(driver, second, {three: 0.5, four: 0.6})
    expected = {one.training_id: one.expected for one in read_decisions(driver.ledger, "late") if not one.kept}
    # nothing had finished by the first decision; by the second kl 0.4 had become 0.1, and l0 16 had stayed
    assert expected[two] == (0.8, 16.0)
    assert expected[four] == pytest.approx((0.6 * 0.1 / 0.4, 16.0))
    past = {training_id("late", one.hyperparameters): one for one in history(driver.ledger, "late", ())}
    assert (past[four].state, past[four].values) == ("stopped", expected[four])


def test_without_halving_stopped_trainings_are_taken_up_again(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=4, halving=HALVING)
    order = take(driver)
    reach(driver, order, dict(zip(ids(order), (0.4, 0.3, 0.2, 0.1), strict=True)))
    driver = start(sweep_folder, pack_size=4)
    packs = [take(driver), take(driver)]
    assert [(pack.steps_done, len(pack.members), pack.last_step) for pack in packs] == [(2, 2, STEPS), (0, 2, STEPS)]


# -- budgets


def test_a_budget_of_tokens_begins_no_more_than_it_covers(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=2, limits=Limits(tokens=3 * TOKENS + 1))
    sizes = []
    while (order := driver.queue.next_pack()) != "finished":
        sizes.append(len(order.members))
        driver.finish(order)
    assert sizes == [2, 1]
    assert driver.queue.token_line == "search.tokens are used up"
    # a larger one goes on
    assert len(take(start(sweep_folder, pack_size=2, limits=Limits(tokens=4 * TOKENS))).members) == 1


def test_tokens_that_halving_saves_begin_further_trainings(sweep_folder: Path) -> None:
    halving = Halving(eta=4, rungs=(2,))
    driver = start(
        sweep_folder, space=SIXTEEN, trainings=16, pack_size=4, halving=halving, limits=Limits(tokens=4 * TOKENS)
    )
    while (order := driver.queue.next_pack()) != "finished":
        if order.last_step == STEPS:
            driver.finish(order)
        else:
            reach(driver, order, {one: 0.01 * (1 + place) for place, one in enumerate(ids(order))})
    assert len(driver.ledger.trainings()) > 4
    assert driver.ledger.spent(["late"]).tokens <= 4 * TOKENS


def test_device_hours_and_wall_time_are_used_up(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=1, limits=Limits(device_hours=2 / 3600))
    order = take(driver)
    driver.report(order, 2)
    assert driver.queue.exceeded_budget() is None
    driver.report(order, 4)
    assert driver.queue.exceeded_budget() == "search.device_hours are used up"
    assert start(sweep_folder, limits=Limits(wall_time=1e-9)).queue.exceeded_budget() == "search.wall_time is used up"
    assert start(sweep_folder, limits=Limits(wall_time=60.0)).queue.exceeded_budget() is None


def test_layers_share_a_budget_and_the_one_that_still_moves_gets_more(sweep_folder: Path) -> None:
    driver = start(
        sweep_folder,
        studies=["early", "late"],
        space=SIXTEEN,
        trainings=16,
        pack_size=1,
        allocation="by_progress",
        new=16,
    )
    begun: Counter[str] = Counter()
    while (order := driver.queue.next_pack()) != "finished":
        (one,) = ids(order)
        study = driver.ledger.training(one).study_id
        begun[study] += 1
        # one layer improves with every training, the other never
        driver.queue.record(order.pack_id, [final(one, kl=0.5 * 0.8 ** begun[study] if study == "late" else 0.5)])
        driver.queue.end(order.pack_id, None)
    assert sum(begun.values()) == 16
    assert begun["early"] == pytest.approx(4, abs=1)


def test_trainings_outside_the_file_take_nothing_of_a_shared_budget(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=4)
    driver.finish(take(driver))
    shared = {"studies": ["early", "late"], "allocation": "by_progress", "new": 4}
    edited = start(sweep_folder, space=SIXTEEN | {"k": [3, 5, 6, 7]}, **shared)
    begun = 0
    while (order := edited.queue.next_pack()) != "finished":
        begun += len(order.members)
        edited.finish(order)
    assert begun == 4


def test_second_chances_are_for_what_the_file_still_asks_for(sweep_folder: Path) -> None:
    halving, limits = Halving(eta=2, rungs=(2,)), Limits(tokens=20 * TOKENS)
    driver = start(sweep_folder, pack_size=4, halving=halving, limits=limits)
    order = take(driver)
    reach(driver, order, {one: 0.1 * (1 + place) for place, one in enumerate(ids(order))})
    (stopped, other) = driver.ledger.trainings(state="stopped")
    driver.finish(take(driver))
    # the file no longer has the size of one of the two
    kept = {name: [stopped.hyperparameters[name]] for name in ("k", "dictionary_size")}
    edited = start(
        sweep_folder,
        space=GRID | kept,
        halving=halving,
        limits=limits,
        is_wanted=lambda one: one.state not in ("finished", "stopped"),
    )
    assert other.hyperparameters != stopped.hyperparameters
    assert ids(take(edited)) == [stopped.training_id]
    edited.finish(edited.queue._running[next(iter(edited.queue._running))][1])
    assert edited.queue.next_pack() == "finished"


@pytest.mark.parametrize("error", [None, "its worker died"])
def test_packs_that_were_asked_to_stop_are_not_at_fault(sweep_folder: Path, error: str | None) -> None:
    driver = start(sweep_folder, pack_size=4)
    order = take(driver)
    driver.report(order, 2)
    driver.queue.stopping = True
    assert driver.queue.next_pack() is None
    driver.queue.end(order.pack_id, error)
    assert driver.queue.next_pack() == "finished"
    assert {(one.state, one.failures) for one in driver.ledger.trainings()} == {("open", 0)}
