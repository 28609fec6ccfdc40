"""Which pack trains next and what becomes of reports: a real ledger, real searches, real checkpoints, no Ray."""

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

from orchestrator.config import SearchConfig
from orchestrator.identity import training_id
from orchestrator.ledger import Ledger, Training
from orchestrator.pack_order import MemberReport, PackOrder, checkpoint_path
from orchestrator.pack_queue import MAX_ATTEMPTS, PackQueue, StudyWork, history
from orchestrator.search.study import StudySearch
from qkmodel.configs import CorpusConfig, ModelConfig, TrainingConfig
from qkmodel.dictionary import CorpusIdentity, ModelIdentity
from qkmodel.errors import InputError
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.member import Member
from qkmodel.pack import CheckpointHeader, checkpoint_steps, save_checkpoint
from qkmodel.products import product_dtype
from qkmodel.reference import LayerReference
from qkmodel.tensor_file import write_tensor_file
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
    is_wanted: Callable[[Training], bool] = lambda training: training.state != "finished",
) -> Driver:
    """Start or continue the sweep in `folder`; `is_wanted` says which recorded trainings are to be continued."""
    ledger = Ledger(folder / "ledger.sqlite")
    ledger.open_sweep("test", {}, None, {})
    works = []
    for study in studies:
        ledger.open_study(study, "transcoder", LAYERS[study], {}, model="m", corpus="c")
        recorded = ledger.trainings(study)
        wanted = {training.training_id for training in recorded if is_wanted(training)}
        search = StudySearch([space], sampler, trainings, 0, history(recorded, wanted))
        works.append(StudyWork(study, search, TOKENS, template(folder, LAYERS[study]), wanted))
    queue = PackQueue(ledger, works, folder, pack_size)
    return Driver(ledger, queue, folder, {work.study_id: work.search for work in works})


def template(folder: Path, layer: int) -> Callable[..., PackOrder]:
    corpus = CorpusConfig(name="text.txt")
    return partial(
        PackOrder,
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
    checkpoint_path(folder, training).parent.mkdir(exist_ok=True)
    save_checkpoint(small_member(), checkpoint_path(folder, training), training, steps)


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
    assert {training.machine["products"] for training in running} == {
        str(product_dtype(order.training.precision, torch.device("cpu"))).removeprefix("torch.")
    }
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
    assert all(checkpoint_path(tmp_path, one).exists() for one in ids(order))
    driver.queue.record(order.pack_id, [final(ids(order)[0])])
    assert [checkpoint_path(tmp_path, one).exists() for one in ids(order)] == [False, True]


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


def test_a_dead_pack_is_tried_again_up_to_three_times_then_fails_with_the_reason(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=4)
    for attempt in range(1, MAX_ATTEMPTS):
        order = take(driver)
        assert ids(order) == grid_ids()
        assert {training.attempts for training in driver.ledger.trainings()} == {attempt}
        driver.queue.end(order.pack_id, "its worker died")
    for killed in grid_ids():
        order = take(driver)
        assert ids(order) == [killed]
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
    assert ids(take(driver)) == grid_ids()


def test_unfinished_trainings_come_before_new_ones_from_their_checkpoint(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=2)
    order = take(driver)
    driver.report(order, 2)
    driver.report(order, 4)
    driver.queue.end(order.pack_id, "its worker died")
    again = take(driver)
    assert (ids(again), again.steps_done) == (ids(order), 4)
    assert take(driver).steps_done == 0


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
    damaged, swapped = (checkpoint_path(tmp_path, one) for one in ids(order))
    swapped.write_bytes(damaged.read_bytes())
    damaged.write_bytes(damaged.read_bytes()[:100])
    driver.queue.end(order.pack_id, "its worker died")
    again = take(driver)
    assert (ids(again), again.steps_done) == (ids(order), 0)
    assert str(damaged) in caplog.text and str(swapped) in caplog.text
    assert not damaged.exists() and not swapped.exists()
    # nothing is thrown away: a person may look at it
    assert len(list(damaged.parent.glob("*.safetensors.damaged"))) == 2


def test_a_checkpoint_that_cannot_be_used_is_said_before_any_pack_runs(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=1)
    order = take(driver)
    driver.report(order, 4)
    path = checkpoint_path(tmp_path, ids(order)[0])
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
    checkpoint_path(tmp_path, waiting).write_bytes(b"nonsense")
    second = take(driver)
    assert (ids(second), second.steps_done) == ([waiting], 4)


def test_a_checkpoint_that_cannot_be_read_now_is_left_alone(tmp_path: Path) -> None:
    driver = start(tmp_path, pack_size=1)
    order = take(driver)
    driver.report(order, 4)
    driver.queue.end(order.pack_id, "its worker died")
    path = checkpoint_path(tmp_path, ids(order)[0])
    content = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, limit[1]))
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
    path = checkpoint_path(tmp_path, one)
    path.parent.mkdir(exist_ok=True)
    newer = CheckpointHeader.model_construct(format=3, training_id=one, steps_done=4)
    write_tensor_file(path, newer, small_member().state_tensors())
    driver.queue.end(order.pack_id, "its worker died")
    with pytest.raises(InputError, match="format 3; this version reads format 2"):
        driver.queue.next_pack()
    assert path.exists()


# -- the next start


def test_the_next_start_continues_what_a_kill_left_running_and_counts_attempts_anew(tmp_path: Path) -> None:
    killed = start(tmp_path, pack_size=4)
    order = take(killed)
    killed.report(order, 4)
    killed.queue.record(order.pack_id, [final(ids(order)[0])])
    driver = start(tmp_path, pack_size=4)
    assert driver.states() == {"finished": 1, "open": 3}
    for members in [ids(order)[1:]] * (MAX_ATTEMPTS - 1) + [[one] for one in ids(order)[1:]]:
        again = take(driver)
        assert (ids(again), again.steps_done) == (members, 4)
        driver.queue.end(again.pack_id, "its worker died")
    assert driver.states() == {"finished": 1, "failed": 3}
    assert {training.attempts for training in driver.ledger.trainings(state="failed")} == {4}


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
        path = checkpoint_path(self.folder, training)
        return checkpoint_steps(path, training) if path.exists() else 0

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
    def nobody_is_tried_more_often_than_allowed(self) -> None:
        assert max(self.deaths.values(), default=0) <= MAX_ATTEMPTS


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
