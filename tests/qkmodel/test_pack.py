"""A packed training equals the same training alone, and a continued one the uninterrupted, bit for bit."""

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qkmodel.transcode
from qkmodel.configs import TrainingConfig
from qkmodel.data_order import batch_sequences, sequences_per_epoch
from qkmodel.errors import InputError
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.member import SharedBatch
from qkmodel.pack import PackTrainer, learning_rate_factor, load_checkpoint, read_checkpoint_header, save_checkpoint
from qkmodel.sparse_code import CentredInputs, Code
from qkmodel.transcode import Side
from qkmodel.transcoder import Transcoder
from tests.qkmodel.members import MEMBERS, NAMES
from tests.qkmodel.world import SmallWorld


def trainer(
    world: SmallWorld, members: list[Hyperparameters], training: TrainingConfig | None = None, threads: int = 1
) -> PackTrainer:
    return PackTrainer(members, world.layer, world.cache, world.reference, training or world.training, 5, threads)


def precise(world: SmallWorld, precision: str) -> TrainingConfig:
    return world.training.model_copy(update={"precision": precision})


def assert_same_state(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("index", range(len(MEMBERS)), ids=NAMES)
def test_packed_equals_alone_on_any_number_of_threads(world: SmallWorld, index: int, precision: str) -> None:
    training = precise(world, precision)
    pack, alone = trainer(world, MEMBERS, training, threads=3), trainer(world, [MEMBERS[index]], training)
    pack.train(10)
    alone.train(10)
    assert_same_state(pack.members[index].state_tensors(), alone.members[0].state_tensors())


def test_a_relu_that_turns_to_the_sparse_way_is_exact_across_the_change(
    world: SmallWorld, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways: list[int] = []

    def counted(transcoder: Transcoder, given: CentredInputs, code: Code) -> Side:
        ways.append(len(code.features))
        return transcode_sparsely(transcoder, given, code)

    transcode_sparsely = qkmodel.transcode._transcode_sparsely
    monkeypatch.setattr("qkmodel.transcode._transcode_sparsely", counted)
    # so that this small dictionary changes over within ten steps
    monkeypatch.setattr("qkmodel.sparse_code.SPARSE_SHARE", 0.4)
    sparse = Hyperparameters(
        dictionary_size=64, activation="relu", penalty="sqrt", sparsity_coefficient=3, learning_rate=0.1
    )
    alone = trainer(world, [sparse])
    alone.train(3)
    assert ways == [], "it began on the sparse way"
    save_checkpoint(alone.members[0], tmp_path / "checkpoint", "id", alone.steps_done)
    alone.train(7)
    assert len(ways) >= 6 and min(ways) > 0
    continued = trainer(world, [MEMBERS[0], sparse], threads=2)
    continued.steps_done = load_checkpoint(continued.members[1], tmp_path / "checkpoint", "id")
    continued.train(7)
    packed = trainer(world, [*MEMBERS[:3], sparse], threads=3)
    packed.train(10)
    for pack in (continued, packed):
        assert_same_state(pack.members[-1].state_tensors(), alone.members[0].state_tensors())


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_continued_equals_uninterrupted(world: SmallWorld, tmp_path, schedule: str) -> None:
    training = world.training.model_copy(
        update={"learning_rate_schedule": schedule, "warmup_share": 0.2, "gradient_clip": 0.5, "tokens": 20 * 4 * 12}
    )
    whole = trainer(world, MEMBERS, training)
    whole.train(100)
    assert whole.finished and whole.steps_done == 20
    first = trainer(world, MEMBERS, training)
    first.train(13)
    for index, member in enumerate(first.members):
        save_checkpoint(member, tmp_path / f"{index}.safetensors", f"id{index}", first.steps_done)
    # continued in another pack, in another order
    second = trainer(world, MEMBERS[::-1], training)
    for index, member in enumerate(reversed(second.members)):
        second.steps_done = load_checkpoint(member, tmp_path / f"{index}.safetensors", f"id{index}")
    second.train(100)
    for ours, theirs in zip(reversed(second.members), whole.members, strict=True):
        assert_same_state(ours.state_tensors(), theirs.state_tensors())


def test_loss_means_are_read_once(world: SmallWorld) -> None:
    pack = trainer(world, MEMBERS[:1])
    pack.train(4)
    means = pack.members[0].losses.take_means()
    assert means.keys() == {"loss", "train_kl", "train_l0"} and means["loss"] >= means["train_kl"] > 0
    assert pack.members[0].losses.take_means() == {}


def test_what_a_step_writes_to_stays_where_it_is(world: SmallWorld) -> None:
    """CUDA graphs know it by its address."""
    pack, other = trainer(world, MEMBERS[:1]), trainer(world, MEMBERS[:1])
    pack.train(2)
    other.train(5)
    member = pack.members[0]

    def addresses() -> dict[str, int]:
        tensors = member.state_tensors()
        return {name: tensor.data_ptr() for name, tensor in tensors.items() if name != "losses.steps"}

    before = addresses()
    member.losses.take_means()
    pack.train(1)
    assert addresses() == before
    member.load_state_tensors(other.members[0].state_tensors())
    assert addresses() == before
    assert_same_state(member.state_tensors(), other.members[0].state_tensors())
    member.load_state_tensors(member.state_tensors())
    assert_same_state(member.state_tensors(), other.members[0].state_tensors())


def test_training_lowers_the_loss(world: SmallWorld) -> None:
    pack = trainer(world, MEMBERS)
    pack.train(4)
    first = [member.losses.take_means()["train_kl"] for member in pack.members]
    pack.train(36)
    [member.losses.take_means() for member in pack.members]
    pack.train(8)
    last = [member.losses.take_means()["train_kl"] for member in pack.members]
    assert all(after < before for before, after in zip(first, last, strict=True))


def test_a_foreign_or_damaged_checkpoint_is_refused(world: SmallWorld, tmp_path) -> None:
    pack = trainer(world, MEMBERS[:2])
    pack.train(1)
    path = tmp_path / "one.safetensors"
    save_checkpoint(pack.members[0], path, "mine", 1)
    assert read_checkpoint_header(path, "mine").steps_done == 1
    with pytest.raises(InputError, match="not a checkpoint of training other"):
        load_checkpoint(pack.members[0], path, "other")
    with pytest.raises(InputError, match="does not fit"):
        load_checkpoint(pack.members[1], path, "mine")
    content = path.read_bytes()
    for damaged in (content[:-100], content[:-1] + bytes([content[-1] ^ 1]), b"", b"nonsense"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"one\.safetensors: (cannot be read|damaged)"):
            read_checkpoint_header(path, "mine")


@given(size=st.integers(1, 9), available=st.integers(1, 40), seed=st.integers(0, 2**32 - 1), epochs=st.integers(1, 4))
def test_every_epoch_visits_every_sequence_once(size: int, available: int, seed: int, epochs: int) -> None:
    steps = -(-epochs * available // size)
    order = np.concatenate([batch_sequences(step, size, available, seed) for step in range(steps)])
    assert order[:available].tolist() == list(range(min(available, len(order))))
    for epoch in range(epochs):
        visited = order[epoch * available : (epoch + 1) * available]
        assert sorted(visited) == list(range(available))


def test_later_epochs_are_reshuffled_differently() -> None:
    order = [batch_sequences(epoch, 50, 50, 3).tolist() for epoch in range(3)]
    assert order[0] != order[1] != order[2] and order[0] != order[2]


def test_an_epoch_is_what_the_training_wants_or_the_corpus_has() -> None:
    training = TrainingConfig(tokens=1000, batch_sequences=3)
    assert sequences_per_epoch(training, 10, None) == 102
    assert sequences_per_epoch(training, 10, 500) == 102
    assert sequences_per_epoch(training, 10, 70) == 70


def test_learning_rate_schedules() -> None:
    def factors(schedule: str, warmup_share: float, *progress: float) -> list[float]:
        training = TrainingConfig(tokens=100, learning_rate_schedule=schedule, warmup_share=warmup_share)
        return [learning_rate_factor(training, one) for one in progress]

    assert factors("constant", 0.0, 0.0, 0.99) == [1, 1]
    assert factors("constant", 0.2, 0.0, 0.05, 0.2, 0.9) == [0, 0.25, 1, 1]
    assert factors("linear", 0.0, 0.0, 0.5, 0.75, 1.0) == [1, 1, 0.5, 0]
    assert factors("cosine", 0.2, 0.1, 0.2, 0.6, 1.0) == pytest.approx([0.5, 1, 0.5, 0])


def test_clipping_bounds_the_gradient_that_the_optimiser_sees(world: SmallWorld) -> None:
    pack = trainer(world, MEMBERS[:1], world.training.model_copy(update={"gradient_clip": 1e-3}))
    pack.train(1)
    # after one step Adam's first moment is a tenth of the gradient
    moments = [state["exp_avg"] for state in pack.members[0].optimiser.state.values()]
    assert 10 * torch.cat([one.flatten() for one in moments]).norm() == pytest.approx(1e-3, rel=1e-3)


class Steps:
    """In place of a member: notes its steps, and fails in one of them if told to."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.batches: list[int] = []
        self.is_stepping = threading.Lock()

    def step(self, batch: SharedBatch, _factor: float, _progress: float) -> None:
        assert self.is_stepping.acquire(blocking=False), "two steps of one member at once"
        time.sleep(0.002)
        if len(self.batches) == self.fails_at:
            raise FloatingPointError("as told")
        self.batches.append(id(batch))
        self.is_stepping.release()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("members", [0, 1, 3])
def test_every_member_takes_every_step_once_and_a_no_leaves_them_at_the_same(
    world: SmallWorld, threads: int, members: int
) -> None:
    pack = trainer(world, [], threads=threads)
    pack.members = [Steps() for _ in range(members)]
    answers = iter([True, True, True, True, False])
    pack.train(9, lambda: next(answers))
    assert pack.steps_done == 4
    assert [len(member.batches) for member in pack.members] == [4] * members
    assert all(member.batches == pack.members[0].batches for member in pack.members)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("fails_at", [0, 3, 5], ids=["first", "middle", "last"])
@pytest.mark.parametrize("says_no", [False, True])
def test_what_a_members_step_raises_is_raised(world: SmallWorld, threads: int, fails_at: int, says_no: bool) -> None:
    pack = trainer(world, [], threads=threads)
    pack.members = [Steps(), Steps(fails_at), Steps()]
    with pytest.raises(FloatingPointError, match="as told"):
        # the no comes when the failing step was the last one to be started
        pack.train(6, lambda: not says_no or pack.steps_done <= fails_at)
