"""Packs on a GPU; all of it is skipped where there is none.

Needs nothing but torch and this package, so that it also runs on a machine without transformer_lens
(`pytest --noconftest`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qkmodel.attention import AttentionLayer
from qkmodel.configs import TrainingConfig
from qkmodel.evaluation import evaluate
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.pack import PackTrainer, load_checkpoint, save_checkpoint
from qkmodel.reference import LayerReference
from tests.qkmodel.layers import random_layer
from tests.qkmodel.members import MEMBERS, NAMES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

CONTEXT, D_MODEL, STEPS = 12, 48, 10
TRAINING = TrainingConfig(tokens=STEPS * 4 * CONTEXT, batch_sequences=4, validation_sequences=8)


@dataclass(frozen=True)
class Activations:
    """Sequences in memory, where a trainer expects an activation cache."""

    train: Tensor
    validation: Tensor
    context: int = CONTEXT
    train_sequences_available: int = 64

    def read_stored(self, _layer: int, split: str, indices: Iterable[int]) -> Tensor:
        return getattr(self, split)[list(indices)]

    def read(self, layer: int, split: str, indices: Iterable[int]) -> Tensor:
        return self.read_stored(layer, split, indices).float()


@dataclass(frozen=True)
class World:
    layer: AttentionLayer
    cache: Activations
    reference: LayerReference

    def on(self, device: str) -> "World":
        means = {name: getattr(self.reference, name).to(device) for name in ("mean_input", "mean_query", "mean_key")}
        layer = AttentionLayer.from_tensors(self.layer.geometry, self.layer.to_tensors()).to(device)
        return World(layer, self.cache, replace(self.reference, **means))

    def trainer(self, members: list[Hyperparameters], precision: str = "float32", **training: object) -> PackTrainer:
        training = TRAINING.model_copy(update={"precision": precision, **training})
        return PackTrainer(members, self.layer, self.cache, self.reference, training, seed=5)


@pytest.fixture(scope="module")
def cpu() -> World:
    layer = random_layer(d_model=D_MODEL, n_heads=4, n_kv_heads=2, d_head=16, rotary_dim=16)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(72, CONTEXT, D_MODEL, generator=generator).bfloat16()
    q, k = layer.project(x.float())
    means = x.float().mean((0, 1)), q.mean((0, 1)).flatten().detach(), k.mean((0, 1)).flatten().detach()
    reference = LayerReference(*means, 1.0, 1.0, 1.0, 0.0, None, None)
    return World(layer, Activations(x[:64], x[64:]), reference)


@pytest.fixture(scope="module")
def gpu(cpu: World) -> World:
    return cpu.on("cuda")


def assert_same_state(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("index", range(len(MEMBERS)), ids=NAMES)
def test_packed_equals_alone_and_recorded_equals_launched(gpu: World, index: int, precision: str) -> None:
    pack, alone = gpu.trainer(MEMBERS, precision), gpu.trainer([MEMBERS[index]], precision)
    pack.train(STEPS)
    alone.train(STEPS)
    assert_same_state(pack.members[index].state_tensors(), alone.members[0].state_tensors())
    launched = gpu.trainer([MEMBERS[index]], precision)
    for step in range(STEPS):
        batch = launched._share(gpu.cache.read(0, "train", launched.sequences_of(step)).cuda())
        launched.members[0].step(batch, 1.0, step / STEPS)
    assert_same_state(pack.members[index].state_tensors(), launched.members[0].state_tensors())


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_continued_equals_uninterrupted(gpu: World, tmp_path: Path, schedule: str) -> None:
    training = {"learning_rate_schedule": schedule, "warmup_share": 0.2, "gradient_clip": 0.5}
    whole = gpu.trainer(MEMBERS, **training)
    whole.train(STEPS)
    first = gpu.trainer(MEMBERS, **training)
    first.train(6)
    for index, member in enumerate(first.members):
        save_checkpoint(member, tmp_path / f"{index}.safetensors", f"id{index}", first.steps_done)
    second = gpu.trainer(MEMBERS[::-1], **training)
    for index, member in enumerate(reversed(second.members)):
        second.steps_done = load_checkpoint(member, tmp_path / f"{index}.safetensors", f"id{index}")
    second.train(STEPS)
    # and in the pack that saved them, whose steps are recorded already
    for index, member in enumerate(first.members):
        first.steps_done = load_checkpoint(member, tmp_path / f"{index}.safetensors", f"id{index}")
    first.train(STEPS)
    for ours, again, theirs in zip(reversed(second.members), first.members, whole.members, strict=True):
        assert_same_state(ours.state_tensors(), theirs.state_tensors())
        assert_same_state(again.state_tensors(), theirs.state_tensors())


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_workers_rhythm_changes_nothing(gpu: World, where: str) -> None:
    """Reports between stretches, a stretch that is broken off, and batches that are on the GPU already."""
    cache = replace(gpu.cache, train=gpu.cache.train.to(where))
    world = replace(gpu, cache=cache)
    whole, stopped = gpu.trainer(MEMBERS), world.trainer(MEMBERS)
    whole.train(STEPS)
    stopped.train(4)
    [member.losses.take_means() for member in stopped.members]
    evaluate([one.transcoder for one in stopped.members], world.layer, world.cache, world.reference, 8)
    answers = iter([True, True, False])
    stopped.train(STEPS, lambda: next(answers))
    assert stopped.steps_done == 6
    stopped.train(STEPS)
    for ours, theirs in zip(stopped.members, whole.members, strict=True):
        assert_same_state(dict(ours.transcoder.state_dict()), dict(theirs.transcoder.state_dict()))
        assert ours.losses.steps == 6 and theirs.losses.steps == STEPS


def test_a_member_that_leaves_changes_nothing_for_the_others(gpu: World) -> None:
    whole, left = gpu.trainer(MEMBERS[:6]), gpu.trainer(MEMBERS[:6])
    whole.train(STEPS)
    left.train(4)
    del left.members[2], left.members[0]
    left.train(STEPS)
    for ours, index in zip(left.members, (1, 3, 4, 5), strict=True):
        assert_same_state(ours.state_tensors(), whole.members[index].state_tensors())


@pytest.mark.parametrize("index", range(len(MEMBERS)), ids=NAMES)
def test_trains_as_the_cpu_does(cpu: World, gpu: World, index: int) -> None:
    ours, theirs = gpu.trainer([MEMBERS[index]]), cpu.trainer([MEMBERS[index]])
    for pack in (ours, theirs):
        pack.train(STEPS)
    first, second = (pack.members[0].losses.take_means() for pack in (ours, theirs))
    for name in first:
        assert first[name] == pytest.approx(second[name], rel=2e-3), name


def test_evaluates_as_the_cpu_does(cpu: World, gpu: World) -> None:
    packs = [world.trainer(MEMBERS[:7]) for world in (cpu, gpu)]
    packs[0].train(STEPS)
    for ours, theirs in zip(packs[1].members, packs[0].members, strict=True):
        ours.load_state_tensors(theirs.state_tensors())
    found = [
        evaluate([one.transcoder for one in pack.members], world.layer, world.cache, world.reference, 8)
        for pack, world in zip(packs, (cpu, gpu), strict=True)
    ]
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
