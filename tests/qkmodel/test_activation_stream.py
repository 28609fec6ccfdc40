"""Activations computed on the way against those of the cache."""

import pytest
import torch

from qkmodel.activation_stream import StreamedActivations
from qkmodel.errors import InputError
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.pack import PackTrainer, load_checkpoint, save_checkpoint
from tests.qkmodel.world import LAYER, SmallWorld, make_world

TOPK = Hyperparameters(dictionary_size=64, activation="topk", k=3, learning_rate=1e-2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    return make_world(tmp_path_factory.mktemp("world"))


def trainer(world: SmallWorld, streamed: bool, *members: Hyperparameters) -> PackTrainer:
    source = StreamedActivations(world.cache, world.model) if streamed else world.cache
    return PackTrainer(members or [TOPK], world.layer, source, world.reference, world.training, seed=0, threads=2)


def test_a_batch_as_the_cache_made_it_is_the_same_to_the_last_bit(world: SmallWorld) -> None:
    source = StreamedActivations(world.cache, world.model)
    # shards of so short sequences go through the model whole
    for start in (0, 128):
        numbers = range(start, start + 64)
        assert torch.equal(source.read(LAYER, "train", numbers), world.cache.read(LAYER, "train", numbers))
    validation = world.cache.read(LAYER, "validation", [3, 1])
    assert torch.equal(source.read(LAYER, "validation", [3, 1]), validation)


def test_any_other_batch_differs_by_rounding_alone(world: SmallWorld) -> None:
    numbers = [5, 190, 17]
    ours = StreamedActivations(world.cache, world.model).read(LAYER, "train", numbers)
    torch.testing.assert_close(ours, world.cache.read(LAYER, "train", numbers), rtol=0.05, atol=0.05)


def test_a_batch_that_goes_through_the_model_in_parts_keeps_its_order(world: SmallWorld, monkeypatch) -> None:
    monkeypatch.setattr("qkmodel.activation_stream.forward_sequences", lambda *_: 2)
    numbers = [5, 190, 17, 3, 60]
    ours = StreamedActivations(world.cache, world.model).read(LAYER, "train", numbers)
    torch.testing.assert_close(ours, world.cache.read(LAYER, "train", numbers), rtol=0.05, atol=0.05)


def test_a_streamed_training_ends_where_a_cached_one_does(world: SmallWorld) -> None:
    ours, theirs = trainer(world, streamed=True), trainer(world, streamed=False)
    for pack in (ours, theirs):
        pack.train(pack.steps_planned)
    losses = [pack.members[0].losses.take_means()["train_kl"] for pack in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_streamed_and_continued_is_streamed_through(world: SmallWorld, tmp_path) -> None:
    through = trainer(world, True, TOPK, TOPK.model_copy(update={"seed": 1}))
    through.train(20)
    first = trainer(world, True)
    first.train(9)
    save_checkpoint(first.members[0], tmp_path / "checkpoint", "id", first.steps_done)
    second = trainer(world, True)
    second.steps_done = load_checkpoint(second.members[0], tmp_path / "checkpoint", "id")
    second.train(11)
    ours, theirs = second.members[0].state_tensors(), through.members[0].state_tensors()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_activations_that_are_not_finite_are_refused(world: SmallWorld) -> None:
    broken = StreamedActivations(world.cache, world.model)
    weight = world.model.bridge.original_model.get_input_embeddings().weight
    before = weight[1].clone()
    with torch.no_grad():
        weight[1] = float("nan")
    try:
        with pytest.raises(InputError, match="layer 1 receives NaN"):
            broken.read(LAYER, "train", [0])
    finally:
        with torch.no_grad():
            weight[1] = before
