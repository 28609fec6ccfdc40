"""Which pack trains next and what becomes of reports: a real ledger, real searches, real checkpoints, no Ray."""

import gc
import resource
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orchestrator.budget import Budget, Limits
from orchestrator.checkpoints import Checkpoints, checkpoint_path, newest_checkpoint
from orchestrator.config import SearchConfig
from orchestrator.identity import training_id
from orchestrator.ledger import Ledger, Training
from orchestrator.ledger_decisions import read_decisions
from orchestrator.pack_order import MemberReport, PackOrder
from orchestrator.pack_queue import MAX_FAILURES, PackQueue, QueueSettings, StudyWork, history
from orchestrator.search.allocation import Allocation
from orchestrator.search.halving import Halving
from orchestrator.search.study import StudySearch
from qkmodel.configs import CorpusConfig, ModelConfig, TrainingConfig
from qkmodel.dictionary import CorpusIdentity, ModelIdentity
from qkmodel.errors import InputError
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.member import Member
from qkmodel.pack import CheckpointHeader, save_checkpoint
from qkmodel.reference import LayerReference
from qkmodel.tensor_file import write_tensor_file
from tests.orchestrator.rung_checks import assert_explained
from tests.qkmodel.layers import random_layer

STEPS, TOKENS_PER_STEP = 8, 100
TOKENS = STEPS * TOKENS_PER_STEP
GRID = {"dictionary_size": [128, 256], "activation": "topk", "k": [4, 8], "learning_rate": 3e-3}
LAYERS = {"early": 4, "late": 8}


@dataclass
class Driver:
    """One start of a sweep: what `orchestrator.sweep` wires together, without Ray around it."""

    ledger: Ledger
    queue: PackQueue
    folder: Path
    searches: dict[str, StudySearch]

    def report(self, order: PackOrder, steps: int, **metrics: float) -> None:
        """Every member has got as far as `steps`: checkpoint written, then reported, as a worker does."""
        for member in order.members:
            write_checkpoint(self.folder, member.training_id, steps)
        self.queue.record(order.pack_id, [progress(member.training_id, steps, **metrics) for member in order.members])

    def finish(self, order: PackOrder) -> None:
        """Every member's last report, and the pack's end."""
        self.queue.record(order.pack_id, [final(member.training_id) for member in order.members])
        self.queue.end(order.pack_id, None)

    def states(self) -> Counter[str]:
        return Counter(training.state for training in self.ledger.trainings())


def start(
    folder: Path,
    *,
    studies: Sequence[str] = ("late",),
    space: dict[str, Any] = GRID,
    sampler: str = "grid",
    trainings: int = 4,
    pack_size: int = 3,
    halving: Halving | None = None,
    allocation: Allocation = "even",
    shared_trainings: int | None = None,
    limits: Limits = Limits(),
    is_wanted: Callable[[Training], bool] = lambda training: training.state != "finished",
) -> Driver:
    """Start or continue the sweep in `folder`; `is_wanted` says which recorded trainings are to be continued."""
    ledger = Ledger(folder / "ledger.sqlite")
    ledger.open_sweep("test", {}, None, {})
    works = []
    for study in studies:
        ledger.open_study(study, "transcoder", LAYERS[study], {}, model="m", corpus="c")
        ledger.set_reference(study, {"kl_baseline": 2.0, "l0_cap": 64.0})
        recorded = ledger.trainings(study)
        wanted = {training.training_id for training in recorded if is_wanted(training)}
        search = StudySearch([space], sampler, trainings, 0, history(ledger, study, wanted))
        works.append(
            StudyWork(study, search, TOKENS_PER_STEP, STEPS, template(folder, LAYERS[study]), {"threads": 2}, wanted)
        )
    settings = QueueSettings(pack_size, halving, allocation, shared_trainings)
    queue = PackQueue(ledger, works, Checkpoints(folder), settings, Budget(limits, ledger, studies, start=1))
    return Driver(ledger, queue, folder, {work.study_id: work.search for work in works})


def template(folder: Path, layer: int) -> Callable[..., PackOrder]:
    corpus = CorpusConfig(name="text.txt")
    return partial(
        PackOrder,
        start=1,
        threads=2,
        sweep_folder=folder,
        cache_folder=folder / "cache",
        streamed=False,
        device="cpu",
        reference_file=folder / "reference",
        model_identity=ModelIdentity(
            config=ModelConfig(name="smollm2-135m"), weights_sha256="aa", layer=layer, hook="hook"
        ),
        corpus_identity=CorpusIdentity(config=corpus, bos=None, sha256="cc"),
        training=TrainingConfig(tokens=TOKENS),
        seed=0,
    )


def progress(training: str, steps: int, seconds: float = 1.0, **metrics: float) -> MemberReport:
    return MemberReport(training_id=training, tokens=steps * TOKENS_PER_STEP, seconds=seconds, metrics=metrics)


def final(training: str, kl: float | None = 0.1, l0: float | None = 16.0) -> MemberReport:
    return MemberReport(
        training_id=training,
        tokens=TOKENS,
        seconds=1.0,
        metrics={"kl": kl, "l0": l0, "kl_recovered": 0.9},
        dictionary=f"dictionaries/{training}",
        dictionary_sha256="dd",
    )


def given_up(training: str, steps: int) -> MemberReport:
    return MemberReport(
        training_id=training, tokens=steps * TOKENS_PER_STEP, seconds=1.0, metrics={}, error="loss was not finite"
    )


@cache
def small_member() -> Member:
    layer = random_layer(d_model=4, d_head=2, n_heads=1, n_kv_heads=1, rotary_dim=2)
    reference = LayerReference(torch.zeros(4), torch.zeros(2), torch.zeros(2), 1.0, 1.0, 1.0, 0.0, None, None)
    hyperparameters = Hyperparameters(dictionary_size=2, activation="topk", k=1, learning_rate=1e-3)
    return Member(hyperparameters, layer, reference, TrainingConfig(tokens=1))


def write_checkpoint(folder: Path, training: str, steps: int) -> None:
    """A real checkpoint, of a small member: the queue reads its head alone."""
    path = checkpoint_path(folder, 1, training, steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(small_member(), path, training, steps)


def steps_on_disk(folder: Path, training: str) -> int:
    found = newest_checkpoint(folder, training)
    return 0 if found is None else found[1].steps_done


def ids(order: PackOrder) -> list[str]:
    return [member.training_id for member in order.members]


def take(driver: Driver) -> PackOrder:
    order = driver.queue.next_pack()
    assert isinstance(order, PackOrder)
    return order


def grid_ids(study: str = "late") -> list[str]:
    points = [{**GRID, "dictionary_size": size, "k": k} for size in GRID["dictionary_size"] for k in GRID["k"]]
    return [training_id(study, point) for point in points]


# -- forming packs


def test_packs_of_the_given_size_hold_every_point_once(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=3)
    first, second = take(driver), take(driver)
    assert ids(first) + ids(second) == grid_ids()
    assert [len(first.members), len(second.members)] == [3, 1]
    assert first.pack_id != second.pack_id
    assert (first.steps_done, first.threads, first.model_identity.layer) == (0, 2, 8)
    assert [member.hyperparameters.k for member in first.members] == [4, 8, 4]


def test_a_pack_that_was_handed_out_is_running_in_the_ledger(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=3)
    order = take(driver)
    running = driver.ledger.trainings(state="running")
    assert [training.training_id for training in running] == ids(order)
    assert {(training.pack, training.attempts, training.tokens_planned) for training in running} == {
        (order.pack_id, 1, TOKENS)
    }
    assert {training.machine["threads"] for training in running} == {2}
    # what nobody has asked for yet is not recorded either
    assert driver.states() == {"running": 3}


def test_nothing_until_a_running_pack_ends_and_finished_when_all_is_done(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=4)
    order = take(driver)
    assert driver.queue.next_pack() is None
    driver.finish(order)
    assert driver.queue.next_pack() == "finished"
    assert driver.queue.next_pack() == "finished"


def test_layers_take_turns_and_never_share_a_pack(tmp_path: Path) -> None:
    driver = start(tmp_path, studies=["early", "late"], pack_size=2)
    orders = [take(driver) for _ in range(4)]
    assert [order.model_identity.layer for order in orders] == [4, 8, 4, 8]
    for order in orders:
        (study,) = {driver.ledger.training(training).study_id for training in ids(order)}
        assert set(ids(order)) <= set(grid_ids(study))


def test_an_adaptive_search_is_asked_for_one_pack_at_a_time(tmp_path: Path) -> None:
    space = GRID | {"k": 4, "dictionary_size": {"low": 64, "high": 4096, "log": True}}
    search = SearchConfig(sampler="tpe", trainings=5, space=space)
    driver = start(tmp_path, space=search.space[0], sampler="tpe", trainings=5, pack_size=2)
    sizes = []
    while (order := driver.queue.next_pack()) != "finished":
        sizes.append(len(order.members))
        assert len(driver.ledger.trainings()) == sum(sizes)
        driver.finish(order)
    assert sizes == [2, 2, 1]
    assert len({training.hyperparameters["dictionary_size"] for training in driver.ledger.trainings()}) == 5


# -- booking reports


def test_progress_and_results_are_booked(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=1)
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


def test_a_checkpoint_lives_until_its_result_is_booked(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=2)
    order = take(driver)
    driver.report(order, 4)
    assert [steps_on_disk(tmp_path, one) for one in ids(order)] == [4, 4]
    driver.queue.record(order.pack_id, [final(ids(order)[0])])
    assert [steps_on_disk(tmp_path, one) for one in ids(order)] == [0, 4]


def test_a_result_that_arrives_twice_is_booked_once(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=1)
    order = take(driver)
    (one,) = ids(order)
    driver.queue.record(order.pack_id, [final(one)])
    first = driver.ledger.training(one)
    driver.queue.record(order.pack_id, [final(one, kl=0.2)])
    driver.queue.end(order.pack_id, None)
    assert driver.ledger.training(one) == first


def test_a_member_that_was_given_up_fails_with_its_reason_and_alone(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=2)
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


def test_a_result_without_kl_is_finished_but_teaches_the_search_nothing(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=4)
    order = take(driver)
    driver.queue.record(order.pack_id, [final(one, kl=None) for one in ids(order)])
    driver.queue.end(order.pack_id, None)
    assert driver.states() == {"finished": 4}
    assert driver.queue.next_pack() == "finished"
    # nor the next start's
    assert start(tmp_path).queue.next_pack() == "finished"


# -- what becomes of a pack that dies


def test_a_dead_pack_is_tried_again_in_smaller_ones_up_to_three_times_then_fails(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=4)
    one, two, three, four = grid_ids()
    for expected in [[one, two, three, four], [one, two], [one], [two], [three, four], [three], [four]]:
        order = take(driver)
        assert ids(order) == expected
        driver.queue.end(order.pack_id, "its worker died")
    assert driver.states() == {"failed": 4}
    assert {training.error for training in driver.ledger.trainings()} == {"its worker died (attempt 3 of 3)"}
    assert driver.queue.next_pack() == "finished"


def test_a_training_that_kills_its_packs_takes_no_other_with_it(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=4)
    killer, *others = grid_ids()
    while (order := driver.queue.next_pack()) != "finished":
        if killer in ids(order):
            driver.queue.end(order.pack_id, "out of memory")
        else:
            driver.finish(order)
    states = {training.training_id: training.state for training in driver.ledger.trainings()}
    assert states == {killer: "failed"} | dict.fromkeys(others, "finished")


def test_a_pack_that_ends_without_a_result_is_tried_again(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=4)
    driver.queue.end(take(driver).pack_id, None)
    assert driver.states() == {"open": 4}
    assert ids(take(driver)) == grid_ids()[:2]


def test_unfinished_trainings_come_before_new_ones_from_their_checkpoint(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=2)
    order = take(driver)
    driver.report(order, 2)
    driver.report(order, 4)
    driver.queue.end(order.pack_id, "its worker died")
    first, second, third = (take(driver) for _ in range(3))
    assert (ids(first), first.steps_done) == (ids(order)[:1], 4)
    assert (ids(second), second.steps_done) == (ids(order)[1:], 4)
    assert third.steps_done == 0


def test_a_pack_holds_only_trainings_with_as_many_steps_done_the_farthest_first(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=4)
    order = take(driver)
    one, two, three, four = ids(order)
    for training, steps in [(one, 2), (two, 4), (three, 2)]:
        write_checkpoint(tmp_path, training, steps)
    driver.queue.end(order.pack_id, "its worker died")
    packs = [take(driver) for _ in range(3)]
    assert [(pack.steps_done, ids(pack)) for pack in packs] == [(4, [two]), (2, [one, three]), (0, [four])]


def test_a_damaged_checkpoint_or_that_of_another_training_is_not_continued(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    driver = start(tmp_path, pack_size=2)
    order = take(driver)
    driver.report(order, 4)
    damaged, swapped = (checkpoint_path(tmp_path, 1, one, 4) for one in ids(order))
    swapped.write_bytes(damaged.read_bytes())
    damaged.write_bytes(damaged.read_bytes()[:100])
    driver.queue.end(order.pack_id, "its worker died")
    again = [take(driver), take(driver)]
    assert [(ids(one), one.steps_done) for one in again] == [([one], 0) for one in ids(order)]
    assert str(damaged) in caplog.text and str(swapped) in caplog.text
    assert not damaged.exists() and not swapped.exists()
    # nothing is thrown away: a person may look at it
    assert len(list(tmp_path.glob("checkpoints/*/*.safetensors.damaged"))) == 2


def test_after_damage_a_training_goes_on_from_the_checkpoint_before(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=1)
    order = take(driver)
    driver.report(order, 2)
    driver.report(order, 4)
    path = checkpoint_path(tmp_path, 1, ids(order)[0], 4)
    path.write_bytes(path.read_bytes()[:-1])
    driver.queue.end(order.pack_id, "its worker died")
    assert take(driver).steps_done == 2


def test_what_a_worker_reported_to_a_dead_driver_is_booked_by_the_next(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=1)
    (one,) = ids(take(driver))
    path = checkpoint_path(tmp_path, 1, one, 4)
    path.parent.mkdir(parents=True)
    save_checkpoint(small_member(), path, one, 4, {"kl": 0.5, "train_l0": None})
    driver = start(tmp_path, pack_size=1)
    assert take(driver).steps_done == 4
    assert [(report.tokens, report.name, report.value) for report in driver.ledger.reports(one)] == [
        (4 * TOKENS_PER_STEP, "kl", 0.5),
        (4 * TOKENS_PER_STEP, "train_l0", None),
    ]


def test_a_checkpoint_that_cannot_be_used_is_said_before_any_pack_runs(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=1)
    order = take(driver)
    driver.report(order, 4)
    path = checkpoint_path(tmp_path, 1, ids(order)[0], 4)
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        start(tmp_path)


def test_a_waiting_checkpoint_is_read_once(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=1)
    for order in (take(driver), take(driver)):
        driver.report(order, 4)
        driver.queue.end(order.pack_id, "its worker died")
    first = take(driver)
    assert first.steps_done == 4
    # whoever still waits is known: its file is not looked at again
    (waiting,) = [one for one in grid_ids()[:2] if one not in ids(first)]
    checkpoint_path(tmp_path, 1, waiting, 4).write_bytes(b"nonsense")
    second = take(driver)
    assert (ids(second), second.steps_done) == ([waiting], 4)


def test_a_checkpoint_that_cannot_be_read_now_is_left_alone(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=1)
    order = take(driver)
    driver.report(order, 4)
    driver.queue.end(order.pack_id, "its worker died")
    path = checkpoint_path(tmp_path, 1, ids(order)[0], 4)
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


def test_a_checkpoint_of_another_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=1)
    order = take(driver)
    (one,) = ids(order)
    path = checkpoint_path(tmp_path, 1, one, 4)
    path.parent.mkdir(parents=True)
    newer = CheckpointHeader.model_construct(format=4, training_id=one, steps_done=4, progress={})
    write_tensor_file(path, newer, small_member().state_tensors())
    driver.queue.end(order.pack_id, "its worker died")
    with pytest.raises(InputError, match="format 4; this version reads format 3"):
        driver.queue.next_pack()
    assert path.exists()


# -- the next start


def test_the_next_start_continues_what_a_kill_left_running(tmp_path: Path) -> None:
    killed = start(tmp_path, pack_size=4)
    order = take(killed)
    killed.report(order, 4)
    killed.queue.record(order.pack_id, [final(ids(order)[0])])
    driver = start(tmp_path, pack_size=4)
    assert driver.states() == {"finished": 1, "open": 3}
    again = take(driver)
    assert (ids(again), again.steps_done) == (ids(order)[1:], 4)
    assert {(one.attempts, one.failures) for one in driver.ledger.trainings(state="running")} == {(2, 0)}


def test_failures_are_counted_over_all_starts(tmp_path: Path) -> None:
    for failures in range(1, MAX_FAILURES):
        driver = start(tmp_path, pack_size=4)
        driver.queue.end(take(driver).pack_id, "its worker died")
        assert driver.ledger.training(grid_ids()[0]).failures == failures
    driver = start(tmp_path, pack_size=4)
    driver.queue.end(take(driver).pack_id, "its worker died")
    assert driver.states()["failed"] == 1
    # a person who starts it once more has perhaps mended something
    assert start(tmp_path).ledger.training(grid_ids()[0]).failures == 0


def test_a_training_that_gets_further_each_time_never_runs_out_of_attempts(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=4)
    for steps in range(1, 1 + MAX_FAILURES):
        order = take(driver)
        driver.report(order, steps)
        driver.queue.end(order.pack_id, "its worker died")
        assert {one.failures for one in driver.ledger.trainings()} == {1}
    for _ in range(1, MAX_FAILURES):
        assert driver.ledger.training(grid_ids()[0]).state == "open"
        driver.queue.end(take(driver).pack_id, "its worker died")
    assert driver.ledger.training(grid_ids()[0]).state == "failed"


def test_the_next_start_tries_failed_trainings_again_and_books_their_results(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=4)
    order = take(driver)
    driver.queue.record(order.pack_id, [given_up(one, 2) for one in ids(order)])
    driver.queue.end(order.pack_id, None)
    assert driver.states() == {"failed": 4}
    driver = start(tmp_path, pack_size=4)
    again = take(driver)
    assert ids(again) == ids(order)
    driver.queue.record(again.pack_id, [given_up(ids(again)[0], 2), *map(final, ids(again)[1:])])
    driver.queue.end(again.pack_id, None)
    assert driver.queue.next_pack() == "finished"
    assert driver.states() == {"failed": 1, "finished": 3}
    assert {training.error for training in driver.ledger.trainings(state="finished")} == {None}


def test_a_larger_grid_trains_only_what_is_missing(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=4)
    driver.finish(take(driver))
    before = driver.ledger.trainings()
    larger = start(tmp_path, space=GRID | {"k": [4, 8, 16]}, trainings=6, pack_size=4)
    order = take(larger)
    assert [(member.hyperparameters.dictionary_size, member.hyperparameters.k) for member in order.members] == [
        (128, 16),
        (256, 16),
    ]
    larger.finish(order)
    assert larger.queue.next_pack() == "finished"
    assert larger.ledger.trainings()[:4] == before


def test_what_the_file_no_longer_asks_for_stays_untrained(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=4)
    order = take(driver)
    driver.report(order, 4)
    driver.queue.end(order.pack_id, "its worker died")
    kept = [one for one, member in zip(ids(order), order.members, strict=True) if member.hyperparameters.k == 8]
    smaller = start(
        tmp_path, space=GRID | {"k": 8}, pack_size=4, is_wanted=lambda training: training.training_id in kept
    )
    again = take(smaller)
    assert (ids(again), again.steps_done) == (kept, 4)
    smaller.finish(again)
    assert smaller.queue.next_pack() == "finished"
    assert smaller.states() == {"finished": 2, "open": 2}


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


def test_at_a_rung_the_better_half_goes_on_in_a_pack_of_its_own(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=4, halving=HALVING)
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
    assert list(tmp_path.glob("checkpoints/*")) == []
    # what a start finds decided it does not decide again, nor train what was stopped
    assert start(tmp_path, halving=HALVING, is_wanted=lambda one: False).queue.next_pack() == "finished"


def test_every_decision_is_explained_by_the_ledger(tmp_path: Path) -> None:
    driver = start(tmp_path, space=SIXTEEN, trainings=16, pack_size=3, halving=HALVING)
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


def test_a_rung_decides_about_a_training_once_whatever_is_lost_later(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=4, halving=HALVING)
    order = take(driver)
    reach(driver, order, dict(zip(ids(order), (0.4, 0.3, 0.2, 0.1), strict=True)))
    while (order := driver.queue.next_pack()) != "finished":
        reach(driver, order, dict.fromkeys(ids(order), 0.2)) if order.last_step < STEPS else driver.finish(order)
    before = read_decisions(driver.ledger, "late")
    finished = driver.ledger.trainings(state="finished")[0].training_id
    driver.ledger.discard_result(finished, "its dictionary is gone")
    again = start(tmp_path, pack_size=4, halving=HALVING, is_wanted=lambda one: one.training_id == finished)
    order = take(again)
    assert (ids(order), order.steps_done, order.last_step) == ([finished], 0, STEPS)
    # reports on the way fall on the rung, and decide nothing
    again.report(order, 2, kl=9.0, l0=9.0)
    again.finish(order)
    assert again.ledger.training(finished).state == "finished"
    assert read_decisions(again.ledger, "late") == before


def test_failures_before_a_rung_do_not_count_after_it(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=4, halving=HALVING)
    for _ in range(MAX_FAILURES - 1):
        driver.queue.end(take(driver).pack_id, "its worker died")
    order = take(driver)
    reach(driver, order, dict.fromkeys(ids(order), 0.1))
    assert driver.ledger.training(ids(order)[0]).failures == 0


def test_a_rung_that_a_driver_died_at_is_decided_by_the_next(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=4, halving=HALVING)
    order = take(driver)
    for one in ids(order):
        write_checkpoint(tmp_path, one, 2)
    driver = start(tmp_path, pack_size=4, halving=HALVING)
    again = take(driver)
    assert (ids(again), again.steps_done, again.last_step) == (ids(order), 2, 2)
    reach(driver, again, dict(zip(ids(order), (0.4, 0.3, 0.2, 0.1), strict=True)))
    assert driver.states() == {"open": 2, "stopped": 2}


def test_families_are_not_compared(tmp_path: Path) -> None:
    space = GRID | {"activation": ["topk", "batchtopk"], "dictionary_size": 128}
    driver = start(tmp_path, space=space, pack_size=4, halving=HALVING)
    order = take(driver)
    families = {one: driver.ledger.training(one).family for one in ids(order)}
    # every batchtopk is worse than any topk
    kl = {
        one: (0.1 if family == "topk" else 0.3) + 0.01 * place for place, (one, family) in enumerate(families.items())
    }
    reach(driver, order, kl)
    going_on = Counter(families[one.training_id] for one in driver.ledger.trainings(state="open"))
    assert going_on == {"topk": 1, "batchtopk": 1}


def test_stopped_trainings_are_told_to_the_search_as_they_would_have_ended(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=2, halving=Halving(eta=2, rungs=(2,)))
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


def test_without_halving_stopped_trainings_are_taken_up_again(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=4, halving=HALVING)
    order = take(driver)
    reach(driver, order, dict(zip(ids(order), (0.4, 0.3, 0.2, 0.1), strict=True)))
    driver = start(tmp_path, pack_size=4)
    packs = [take(driver), take(driver)]
    assert [(pack.steps_done, len(pack.members), pack.last_step) for pack in packs] == [(2, 2, STEPS), (0, 2, STEPS)]


# -- budgets


def test_a_budget_of_tokens_begins_no_more_than_it_covers(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=2, limits=Limits(tokens=3 * TOKENS + 1))
    sizes = []
    while (order := driver.queue.next_pack()) != "finished":
        sizes.append(len(order.members))
        driver.finish(order)
    assert sizes == [2, 1]
    assert driver.queue.token_line == "search.tokens are used up"
    # a larger one goes on
    assert len(take(start(tmp_path, pack_size=2, limits=Limits(tokens=4 * TOKENS))).members) == 1


def test_tokens_that_halving_saves_begin_further_trainings(tmp_path: Path) -> None:
    halving = Halving(eta=4, rungs=(2,))
    driver = start(
        tmp_path, space=SIXTEEN, trainings=16, pack_size=4, halving=halving, limits=Limits(tokens=4 * TOKENS)
    )
    while (order := driver.queue.next_pack()) != "finished":
        if order.last_step == STEPS:
            driver.finish(order)
        else:
            reach(driver, order, {one: 0.01 * (1 + place) for place, one in enumerate(ids(order))})
    assert len(driver.ledger.trainings()) > 4
    assert driver.ledger.spent(["late"]).tokens <= 4 * TOKENS


def test_device_hours_and_wall_time_are_used_up(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=1, limits=Limits(device_hours=2 / 3600))
    order = take(driver)
    driver.report(order, 2)
    assert driver.queue.exceeded_budget() is None
    driver.report(order, 4)
    assert driver.queue.exceeded_budget() == "search.device_hours are used up"
    assert start(tmp_path, limits=Limits(wall_time=1e-9)).queue.exceeded_budget() == "search.wall_time is used up"
    assert start(tmp_path, limits=Limits(wall_time=60.0)).queue.exceeded_budget() is None


def test_layers_share_a_budget_and_the_one_that_still_moves_gets_more(tmp_path: Path) -> None:
    driver = start(
        tmp_path,
        studies=["early", "late"],
        space=SIXTEEN,
        trainings=16,
        pack_size=1,
        allocation="by_progress",
        shared_trainings=16,
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


def test_packs_that_were_asked_to_stop_are_not_at_fault(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=4)
    order = take(driver)
    driver.report(order, 2)
    driver.queue.stopping = True
    assert driver.queue.next_pack() is None
    driver.queue.end(order.pack_id, None)
    assert driver.queue.next_pack() == "finished"
    assert {(one.state, one.failures) for one in driver.ledger.trainings()} == {("open", 0)}


# -- any order of events


class AnyOrder(RuleBasedStateMachine):
    """Workers report, give up, finish and die, drivers are killed and started again, in any order."""

    def __init__(self) -> None:
        super().__init__()
        # in memory where the machine has such a folder: every booking waits for the disk
        memory = Path("/dev/shm")
        self._temporary = TemporaryDirectory(dir=memory if memory.is_dir() else None)
        self.folder = Path(self._temporary.name)
        self.running: dict[str, tuple[PackOrder, int]] = {}
        self.results: dict[str, Training] = {}
        self.deaths: Counter[str] = Counter()
        self.packs_asked_for = 0
        self.driver = self._start()

    def _start(self) -> Driver:
        return start(self.folder, studies=["early", "late"], pack_size=3)

    def teardown(self) -> None:
        """Left in peace from here on, the sweep comes to its end."""
        self._start_again()
        while (order := self.driver.queue.next_pack()) != "finished":
            self.driver.finish(order)
        assert self.driver.states() == {"finished": 8}
        self.a_result_never_changes()
        self.driver.ledger.close()
        self._temporary.cleanup()

    @precondition(lambda self: len(self.running) < 3)
    @rule()
    def ask(self) -> None:
        order = self.driver.queue.next_pack()
        self.packs_asked_for += 1
        if isinstance(order, PackOrder):
            assert order.pack_id not in self.running
            assert order.steps_done == max(map(self._steps_on_disk, ids(order)))
            assert order.steps_done == min(map(self._steps_on_disk, ids(order)))
            self.running[order.pack_id] = (order, order.steps_done)
        elif order is None:
            assert self.running
        else:
            assert not self.running
            assert self.driver.states().keys() <= {"finished", "failed"}
            assert len(self.driver.ledger.trainings()) == 8

    @precondition(lambda self: self.running)
    @rule(data=st.data(), steps=st.sampled_from([2, STEPS]))
    def work(self, data: st.DataObject, steps: int) -> None:
        """A pack comes to its next report, which for some members may be the last."""
        order, done = self.running[data.draw(st.sampled_from(sorted(self.running)))]
        done = min(STEPS, done + steps)
        alive = [one for one in ids(order) if self.driver.ledger.training(one).state == "running"]
        lost = data.draw(st.lists(st.sampled_from(alive), unique=True, max_size=1)) if alive else []
        rest = [one for one in alive if one not in lost]
        if done == STEPS:
            reports = [final(one) for one in rest]
        else:
            reports = [progress(one, done, loss=0.5) for one in rest]
            for one in rest:
                write_checkpoint(self.folder, one, done)
                del self.deaths[one]
        self.driver.queue.record(order.pack_id, [given_up(one, done) for one in lost] + reports)
        self.running[order.pack_id] = (order, done)
        if done == STEPS or not rest:
            self._end(order, None)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        order, _ = self.running[data.draw(st.sampled_from(sorted(self.running)))]
        self.deaths.update(one for one in ids(order) if self.driver.ledger.training(one).state == "running")
        self._end(order, "its worker died")

    @precondition(lambda self: self.packs_asked_for > 2)
    @rule()
    def kill_the_driver(self) -> None:
        self._start_again()

    def _start_again(self) -> None:
        self.driver.ledger.close()
        self.running.clear()
        self.deaths.clear()
        self.packs_asked_for = 0
        self.driver = self._start()

    def _end(self, order: PackOrder, error: str | None) -> None:
        self.driver.queue.end(order.pack_id, error)
        del self.running[order.pack_id]

    def _steps_on_disk(self, training: str) -> int:
        return steps_on_disk(self.folder, training)

    @invariant()
    def no_training_is_in_two_packs_and_none_is_lost(self) -> None:
        members = [one for order, _ in self.running.values() for one in ids(order)]
        assert len(members) == len(set(members))
        running = {one.training_id for one in self.driver.ledger.trainings(state="running")}
        assert running <= set(members)

    @invariant()
    def packs_are_of_one_layer(self) -> None:
        for order, _ in self.running.values():
            assert {self.driver.ledger.training(one).layer for one in ids(order)} == {order.model_identity.layer}

    @invariant()
    def a_result_never_changes(self) -> None:
        finished = {one.training_id: one for one in self.driver.ledger.trainings(state="finished")}
        assert self.results.items() <= finished.items()
        self.results = finished

    @invariant()
    def nobody_is_tried_more_often_than_allowed_without_getting_further(self) -> None:
        assert max(self.deaths.values(), default=0) <= MAX_FAILURES


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
