"""Which pack trains next and what becomes of reports, of packs that die, and at the next start."""

import gc
import resource
from pathlib import Path

import pytest

from orchestrator.checkpoints import checkpoint_path
from orchestrator.config import SearchConfig
from orchestrator.pack_queue import MAX_FAILURES
from qkmodel.errors import InputError
from qkmodel.pack import CheckpointHeader, save_checkpoint
from qkmodel.tensor_file import write_tensor_file
from tests.orchestrator.pack_world import (
    GRID,
    TOKENS,
    TOKENS_PER_STEP,
    final,
    given_up,
    grid_ids,
    ids,
    progress,
    small_member,
    start,
    steps_on_disk,
    take,
    write_checkpoint,
)

# -- forming packs


def test_packs_of_the_given_size_hold_every_point_once(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=3)
    first, second = take(driver), take(driver)
    assert ids(first) + ids(second) == grid_ids()
    assert [len(first.members), len(second.members)] == [3, 1]
    assert first.pack_id != second.pack_id
    assert (first.steps_done, first.threads, first.model_identity.layer) == (0, 2, 8)
    assert [member.hyperparameters.k for member in first.members] == [4, 8, 4]


def test_a_pack_that_was_handed_out_is_running_in_the_ledger(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=3)
    order = take(driver)
    running = driver.ledger.trainings(state="running")
    assert [training.training_id for training in running] == ids(order)
    assert {(training.pack, training.attempts, training.tokens_planned) for training in running} == {
        (order.pack_id, 1, TOKENS)
    }
    assert {training.machine["threads"] for training in running} == {2}
    # what nobody has asked for yet is not recorded either
    assert driver.states() == {"running": 3}


def test_nothing_until_a_running_pack_ends_and_finished_when_all_is_done(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=4)
    order = take(driver)
    assert driver.queue.next_pack() is None
    driver.finish(order)
    assert driver.queue.next_pack() == "finished"
    assert driver.queue.next_pack() == "finished"


def test_layers_take_turns_and_never_share_a_pack(sweep_folder: Path) -> None:
    driver = start(sweep_folder, studies=["early", "late"], pack_size=2)
    orders = [take(driver) for _ in range(4)]
    assert [order.model_identity.layer for order in orders] == [4, 8, 4, 8]
    for order in orders:
        (study,) = {driver.ledger.training(training).study_id for training in ids(order)}
        assert set(ids(order)) <= set(grid_ids(study))


def test_an_adaptive_search_is_asked_for_one_pack_at_a_time(sweep_folder: Path) -> None:
    space = GRID | {"k": 4, "dictionary_size": {"low": 64, "high": 4096, "log": True}}
    search = SearchConfig(sampler="tpe", trainings=5, space=space)
    driver = start(sweep_folder, space=search.space[0], sampler="tpe", trainings=5, pack_size=2)
    sizes = []
    while (order := driver.queue.next_pack()) != "finished":
        sizes.append(len(order.members))
        assert len(driver.ledger.trainings()) == sum(sizes)
        driver.finish(order)
    assert sizes == [2, 2, 1]
    assert len({training.hyperparameters["dictionary_size"] for training in driver.ledger.trainings()}) == 5


# -- booking reports


def test_progress_and_results_are_booked(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=1)
    order = take(driver)
    (one,) = ids(order)
    driver.report(order, 2, loss=0.5)
    driver.report(order, 4, loss=0.25)
    assert driver.ledger.training(one).tokens_done == 4 * TOKENS_PER_STEP
    driver.finish(order)
    training = driver.ledger.training(one)
    assert training.state == "finished"
    assert training.metrics == {"kl": 0.1, "l0": 16.0, "kl_recovered": 0.9}
    assert (training.dictionary, training.dictionary_sha256) == (f"dictionaries/{one}", "dd")
    assert (training.tokens_done, training.seconds, training.attempts) == (TOKENS, 3.0, 1)
    # final metrics are no progress: they stand in the result alone
    assert [(report.tokens, report.name, report.value) for report in driver.ledger.reports(one)] == [
        (200, "loss", 0.5),
        (400, "loss", 0.25),
    ]


def test_a_checkpoint_lives_until_its_result_is_booked(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=2)
    order = take(driver)
    driver.report(order, 4)
    assert [steps_on_disk(sweep_folder, one) for one in ids(order)] == [4, 4]
    driver.queue.record(order.pack_id, [final(ids(order)[0])])
    assert [steps_on_disk(sweep_folder, one) for one in ids(order)] == [0, 4]


def test_a_result_that_arrives_twice_is_booked_once(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=1)
    order = take(driver)
    (one,) = ids(order)
    driver.queue.record(order.pack_id, [final(one)])
    first = driver.ledger.training(one)
    driver.queue.record(order.pack_id, [final(one, kl=0.2)])
    driver.queue.end(order.pack_id, None)
    assert driver.ledger.training(one) == first


def test_a_member_that_was_given_up_fails_with_its_reason_and_alone(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=2)
    order = take(driver)
    bad, good = ids(order)
    driver.queue.record(order.pack_id, [given_up(bad, 2), progress(good, 2, loss=0.5)])
    driver.queue.record(order.pack_id, [final(good)])
    driver.queue.end(order.pack_id, None)
    failed = driver.ledger.training(bad)
    assert (failed.state, failed.error, failed.attempts) == ("failed", "loss was not finite", 1)
    assert failed.tokens_done == 2 * TOKENS_PER_STEP
    assert driver.ledger.training(good).state == "finished"
    # giving up is final: the same data give the same loss
    rest = take(driver)
    assert bad not in ids(rest)
    driver.finish(rest)
    assert driver.queue.next_pack() == "finished"
    assert driver.states() == {"finished": 3, "failed": 1}


def test_a_result_without_kl_is_finished_but_teaches_the_search_nothing(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=4)
    order = take(driver)
    driver.queue.record(order.pack_id, [final(one, kl=None) for one in ids(order)])
    driver.queue.end(order.pack_id, None)
    assert driver.states() == {"finished": 4}
    assert driver.queue.next_pack() == "finished"
    # nor the next start's
    assert start(sweep_folder).queue.next_pack() == "finished"


# -- what becomes of a pack that dies


def test_a_dead_pack_is_tried_again_in_smaller_ones_up_to_three_times_then_fails(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=4)
    one, two, three, four = grid_ids()
    for expected in [[one, two, three, four], [one, two], [one], [two], [three, four], [three], [four]]:
        order = take(driver)
        assert ids(order) == expected
        driver.queue.end(order.pack_id, "its worker died")
    assert driver.states() == {"failed": 4}
    assert {training.error for training in driver.ledger.trainings()} == {"its worker died (attempt 3 of 3)"}
    assert driver.queue.next_pack() == "finished"


def test_a_training_that_kills_its_packs_takes_no_other_with_it(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=4)
    killer, *others = grid_ids()
    while (order := driver.queue.next_pack()) != "finished":
        if killer in ids(order):
            driver.queue.end(order.pack_id, "out of memory")
        else:
            driver.finish(order)
    states = {training.training_id: training.state for training in driver.ledger.trainings()}
    assert states == {killer: "failed"} | dict.fromkeys(others, "finished")


def test_a_pack_that_ends_without_a_result_is_tried_again(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=4)
    driver.queue.end(take(driver).pack_id, None)
    assert driver.states() == {"open": 4}
    assert ids(take(driver)) == grid_ids()[:2]


def test_unfinished_trainings_come_before_new_ones_from_their_checkpoint(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=2)
    order = take(driver)
    driver.report(order, 2)
    driver.report(order, 4)
    driver.queue.end(order.pack_id, "its worker died")
    first, second, third = (take(driver) for _ in range(3))
    assert (ids(first), first.steps_done) == (ids(order)[:1], 4)
    assert (ids(second), second.steps_done) == (ids(order)[1:], 4)
    assert third.steps_done == 0


def test_a_pack_holds_only_trainings_with_as_many_steps_done_the_farthest_first(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=4)
    order = take(driver)
    one, two, three, four = ids(order)
    for training, steps in [(one, 2), (two, 4), (three, 2)]:
        write_checkpoint(sweep_folder, training, steps)
    driver.queue.end(order.pack_id, "its worker died")
    packs = [take(driver) for _ in range(3)]
    assert [(pack.steps_done, ids(pack)) for pack in packs] == [(4, [two]), (2, [one, three]), (0, [four])]


def test_a_damaged_checkpoint_or_that_of_another_training_is_not_continued(
    sweep_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    driver = start(sweep_folder, pack_size=2)
    order = take(driver)
    driver.report(order, 4)
    damaged, swapped = (checkpoint_path(sweep_folder, 1, one, 4) for one in ids(order))
    swapped.write_bytes(damaged.read_bytes())
    damaged.write_bytes(damaged.read_bytes()[:100])
    driver.queue.end(order.pack_id, "its worker died")
    again = [take(driver), take(driver)]
    assert [(ids(one), one.steps_done) for one in again] == [([one], 0) for one in ids(order)]
    assert str(damaged) in caplog.text and str(swapped) in caplog.text
    assert not damaged.exists() and not swapped.exists()
    # nothing is thrown away: a person may look at it
    assert len(list(sweep_folder.glob("checkpoints/*/*.safetensors.damaged"))) == 2


def test_after_damage_a_training_goes_on_from_the_checkpoint_before(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=1)
    order = take(driver)
    driver.report(order, 2)
    driver.report(order, 4)
    path = checkpoint_path(sweep_folder, 1, ids(order)[0], 4)
    path.write_bytes(path.read_bytes()[:-1])
    driver.queue.end(order.pack_id, "its worker died")
    assert take(driver).steps_done == 2


def test_what_a_worker_reported_to_a_dead_driver_is_booked_by_the_next(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=1)
    (one,) = ids(take(driver))
    path = checkpoint_path(sweep_folder, 1, one, 4)
    path.parent.mkdir(parents=True)
    save_checkpoint(small_member(), path, one, 4, {"kl": 0.5, "train_l0": None})
    driver = start(sweep_folder, pack_size=1)
    assert take(driver).steps_done == 4
    assert [(report.tokens, report.name, report.value) for report in driver.ledger.reports(one)] == [
        (4 * TOKENS_PER_STEP, "kl", 0.5),
        (4 * TOKENS_PER_STEP, "train_l0", None),
    ]


def test_what_a_worker_reported_twice_to_a_driver_without_a_ledger_is_booked_by_the_next(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=1)
    order = take(driver)
    driver.report(order, 2, kl=0.7)
    (one,) = ids(order)
    for steps, kl in ((4, 0.6), (6, 0.5)):
        save_checkpoint(small_member(), checkpoint_path(sweep_folder, 1, one, steps), one, steps, {"kl": kl})
    driver = start(sweep_folder, pack_size=1)
    assert take(driver).steps_done == 6
    reports = [(report.tokens // TOKENS_PER_STEP, report.value) for report in driver.ledger.reports(one)]
    assert reports == [(2, 0.7), (4, 0.6), (6, 0.5)]


def test_a_checkpoint_that_cannot_be_used_is_said_before_any_pack_runs(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=1)
    order = take(driver)
    driver.report(order, 4)
    path = checkpoint_path(sweep_folder, 1, ids(order)[0], 4)
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        start(sweep_folder)


def test_a_waiting_checkpoint_is_read_once(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=1)
    for order in (take(driver), take(driver)):
        driver.report(order, 4)
        driver.queue.end(order.pack_id, "its worker died")
    first = take(driver)
    assert first.steps_done == 4
    # whoever still waits is known: its file is not looked at again
    (waiting,) = [one for one in grid_ids()[:2] if one not in ids(first)]
    checkpoint_path(sweep_folder, 1, waiting, 4).write_bytes(b"nonsense")
    second = take(driver)
    assert (ids(second), second.steps_done) == ([waiting], 4)


def test_a_checkpoint_that_cannot_be_read_now_is_left_alone(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=1)
    order = take(driver)
    driver.report(order, 4)
    driver.queue.end(order.pack_id, "its worker died")
    path = checkpoint_path(sweep_folder, 1, ids(order)[0], 4)
    content = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, limit[1]))
        # what is collected later would make room
        gc.collect()
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                opened.append(path.open("rb"))
        with pytest.raises(OSError, match="Too many open files"):
            driver.queue.next_pack()
    finally:
        for file in opened:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert path.read_bytes() == content
    assert take(driver).steps_done == 4


def test_a_checkpoint_of_another_version_is_refused_and_left_alone(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=1)
    order = take(driver)
    (one,) = ids(order)
    path = checkpoint_path(sweep_folder, 1, one, 4)
    path.parent.mkdir(parents=True)
    newer = CheckpointHeader.model_construct(format=4, training_id=one, steps_done=4, progress={})
    write_tensor_file(path, newer, small_member().state_tensors())
    driver.queue.end(order.pack_id, "its worker died")
    with pytest.raises(InputError, match="format 4; this version reads format 3"):
        driver.queue.next_pack()
    assert path.exists()


# -- the next start


def test_the_next_start_continues_what_a_kill_left_running(sweep_folder: Path) -> None:
    killed = start(sweep_folder, pack_size=4)
    order = take(killed)
    killed.report(order, 4)
    killed.queue.record(order.pack_id, [final(ids(order)[0])])
    driver = start(sweep_folder, pack_size=4)
    assert driver.states() == {"finished": 1, "open": 3}
    again = take(driver)
    assert (ids(again), again.steps_done) == (ids(order)[1:], 4)
    assert {(one.attempts, one.failures) for one in driver.ledger.trainings(state="running")} == {(2, 0)}


def test_failures_are_counted_over_all_starts(sweep_folder: Path) -> None:
    for failures in range(1, MAX_FAILURES):
        driver = start(sweep_folder, pack_size=4)
        driver.queue.end(take(driver).pack_id, "its worker died")
        assert driver.ledger.training(grid_ids()[0]).failures == failures
    driver = start(sweep_folder, pack_size=4)
    driver.queue.end(take(driver).pack_id, "its worker died")
    assert driver.states()["failed"] == 1
    # a person who starts it once more has perhaps mended something
    assert start(sweep_folder).ledger.training(grid_ids()[0]).failures == 0


def test_a_training_that_gets_further_each_time_never_runs_out_of_attempts(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=4)
    for steps in range(1, 1 + MAX_FAILURES):
        order = take(driver)
        driver.report(order, steps)
        driver.queue.end(order.pack_id, "its worker died")
        assert {one.failures for one in driver.ledger.trainings()} == {1}
    for _ in range(1, MAX_FAILURES):
        assert driver.ledger.training(grid_ids()[0]).state == "open"
        driver.queue.end(take(driver).pack_id, "its worker died")
    assert driver.ledger.training(grid_ids()[0]).state == "failed"


def test_the_next_start_tries_failed_trainings_again_and_books_their_results(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=4)
    order = take(driver)
    driver.queue.record(order.pack_id, [given_up(one, 2) for one in ids(order)])
    driver.queue.end(order.pack_id, None)
    assert driver.states() == {"failed": 4}
    driver = start(sweep_folder, pack_size=4)
    again = take(driver)
    assert ids(again) == ids(order)
    driver.queue.record(again.pack_id, [given_up(ids(again)[0], 2), *map(final, ids(again)[1:])])
    driver.queue.end(again.pack_id, None)
    assert driver.queue.next_pack() == "finished"
    assert driver.states() == {"failed": 1, "finished": 3}
    assert {training.error for training in driver.ledger.trainings(state="finished")} == {None}


def test_a_larger_grid_trains_only_what_is_missing(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=4)
    driver.finish(take(driver))
    before = driver.ledger.trainings()
    larger = start(sweep_folder, space=GRID | {"k": [4, 8, 16]}, trainings=6, pack_size=4)
    order = take(larger)
    assert [(member.hyperparameters.dictionary_size, member.hyperparameters.k) for member in order.members] == [
        (128, 16),
        (256, 16),
    ]
    larger.finish(order)
    assert larger.queue.next_pack() == "finished"
    assert larger.ledger.trainings()[:4] == before


def test_what_the_file_no_longer_asks_for_stays_untrained(sweep_folder: Path) -> None:
    driver = start(sweep_folder, pack_size=4)
    order = take(driver)
    driver.report(order, 4)
    driver.queue.end(order.pack_id, "its worker died")
    kept = [one for one, member in zip(ids(order), order.members, strict=True) if member.hyperparameters.k == 8]
    smaller = start(
        sweep_folder, space=GRID | {"k": 8}, pack_size=4, is_wanted=lambda training: training.training_id in kept
    )
    again = take(smaller)
    assert (ids(again), again.steps_done) == (kept, 4)
    smaller.finish(again)
    assert smaller.queue.next_pack() == "finished"
    assert smaller.states() == {"finished": 2, "open": 2}
