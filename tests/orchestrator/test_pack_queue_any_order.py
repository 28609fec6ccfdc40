"""Whatever order asking, working, dying and starting again come in, nothing is lost and nothing is trained twice."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orchestrator.ledger import Training
from orchestrator.ledger_decisions import read_decisions
from orchestrator.pack_order import PackOrder
from orchestrator.pack_queue import MAX_FAILURES
from orchestrator.search.halving import Halving
from tests.orchestrator.pack_world import (
    STEPS,
    Driver,
    final,
    given_up,
    ids,
    progress,
    start,
    steps_on_disk,
    write_checkpoint,
)
from tests.orchestrator.rung_checks import assert_explained

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

    halving: Halving | None = None

    def _start(self) -> Driver:
        return start(
            self.folder,
            studies=["early", "late"],
            pack_size=3,
            halving=self.halving,
            is_wanted=lambda one: one.state not in ("finished", "stopped"),
        )

    def teardown(self) -> None:
        """Left in peace from here on, the sweep comes to its end."""
        self._start_again()
        while (order := self.driver.queue.next_pack()) != "finished":
            if order.last_step == STEPS:
                self.driver.finish(order)
            else:
                self._report(order, ids(order), order.last_step, kl=0.3)
                self.driver.queue.end(order.pack_id, None)
        assert self.driver.states().keys() <= {"finished", "stopped"}
        assert sum(self.driver.states().values()) == 8
        self.a_result_never_changes()
        self.what_was_decided_is_explained()
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
            assert self.driver.states().keys() <= {"finished", "stopped", "failed"}
            assert len(self.driver.ledger.trainings()) == 8

    @precondition(lambda self: self.running)
    @rule(data=st.data(), steps=st.sampled_from([2, STEPS]), kl=st.sampled_from([0.1, 0.2, 0.3, 0.4]))
    def work(self, data: st.DataObject, steps: int, kl: float) -> None:
        """A pack comes to its next report, which for some members may be the last."""
        order, done = self.running[data.draw(st.sampled_from(sorted(self.running)))]
        done = min(order.last_step, done + steps)
        alive = [one for one in ids(order) if self.driver.ledger.training(one).state == "running"]
        lost = data.draw(st.lists(st.sampled_from(alive), unique=True, max_size=1)) if alive else []
        rest = [one for one in alive if one not in lost]
        self.driver.queue.record(order.pack_id, [given_up(one, done) for one in lost])
        self._report(order, rest, done, kl)
        self.running[order.pack_id] = (order, done)
        if done == order.last_step or not rest:
            self._end(order, None)

    def _report(self, order: PackOrder, members: Sequence[str], done: int, kl: float) -> None:
        if done == STEPS:
            reports = [final(one) for one in members]
        else:
            figures = [{"kl": kl * (1 + place), "l0": 16.0, "kl_recovered": 0.9} for place in range(len(members))]
            reports = [progress(one, done, **its) for one, its in zip(members, figures, strict=True)]
            for one, its in zip(members, figures, strict=True):
                write_checkpoint(self.folder, one, done, its)
                del self.deaths[one]
        self.driver.queue.record(order.pack_id, reports)

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

    @invariant()
    def what_was_decided_is_explained(self) -> None:
        for study in ("early", "late"):
            decisions = read_decisions(self.driver.ledger, study)
            assert_explained(decisions, eta=2)
            where = [(one.training_id, one.tokens) for one in decisions]
            assert len(where) == len(set(where)), "decided about twice"
            stopped = {one.training_id for one in decisions if not one.kept}
            assert stopped == {one.training_id for one in self.driver.ledger.trainings(study, "stopped")}


class AnyOrderWithRungs(AnyOrder):
    """The same where trainings are stopped at rungs."""

    halving = Halving(eta=2, rungs=(2, 4))


TestAnyOrder = AnyOrder.TestCase
TestAnyOrderWithRungs = AnyOrderWithRungs.TestCase
TestAnyOrderWithRungs.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
TestAnyOrder.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
