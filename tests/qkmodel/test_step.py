"""A step of every kind of training against plain autograd and a plain Adam, in float64, on the loss as it is stated."""

import copy

import pytest
import torch

from qkmodel.data_order import batch_sequences
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.pack import PackTrainer
from qkmodel.transcoder import QKTranscoder
from tests.qkmodel.stated_loss import StatedSide, stated_step
from tests.qkmodel.world import CONTEXT, LAYER, SmallWorld

STEPS, STEPS_PLANNED, SEED = 4, 6, 5
RELU = {"activation": "relu", "learning_rate": 3e-3}
# Coefficients so large that the penalty moves weights about as much as the pattern loss does.
KINDS = {
    "topk": Hyperparameters(dictionary_size=64, activation="topk", k=3, learning_rate=1e-2),
    "topk, dense": Hyperparameters(dictionary_size=24, activation="topk", k=3, learning_rate=1e-2),
    "topk, two sizes": Hyperparameters(
        dictionary_size=64, key_dictionary_size=32, activation="topk", k=3, key_k=2, learning_rate=1e-2
    ),
    "batchtopk": Hyperparameters(dictionary_size=64, activation="batchtopk", k=3, key_k=2, learning_rate=1e-2),
    "batchtopk, dense": Hyperparameters(dictionary_size=24, activation="batchtopk", k=3, learning_rate=1e-2),
    "jumprelu": Hyperparameters(
        dictionary_size=40, activation="jumprelu", sparsity_coefficient=0.3, key_sparsity_coefficient=1.0,
        learning_rate=3e-3,
    ),
    "l1": Hyperparameters(dictionary_size=40, penalty="l1", sparsity_coefficient=0.1, **RELU),
    "sqrt": Hyperparameters(dictionary_size=24, penalty="sqrt", sparsity_coefficient=0.1, seed=7, **RELU),
    "tanh": Hyperparameters(
        dictionary_size=24, penalty="tanh", sparsity_coefficient=0.1, key_sparsity_coefficient=0.03, **RELU
    ),
    "p-annealing": Hyperparameters(dictionary_size=24, penalty="p_annealing", sparsity_coefficient=0.1, **RELU),
    "steered l0": Hyperparameters(dictionary_size=40, penalty="l1", target_l0=5, key_target_l0=30, **RELU),
}  # fmt: skip


def trainer(world: SmallWorld, hyperparameters: Hyperparameters) -> PackTrainer:
    """A training so short that schedules move within the steps looked at."""
    tokens = STEPS_PLANNED * world.training.batch_sequences * CONTEXT
    training = world.training.model_copy(update={"precision": "float32", "tokens": tokens})
    pack = PackTrainer([hyperparameters], world.layer, world.cache, world.reference, training, SEED)
    if hyperparameters.activation == "jumprelu":
        _lift_thresholds(pack.members[0].transcoder)
    return pack


def _lift_thresholds(transcoder: QKTranscoder) -> None:
    """Of some features, which then never fire, so that only what pushes such features up reaches them."""
    with torch.no_grad():
        for side in (transcoder.query, transcoder.key):
            side.activation.log_threshold[:8] += 3.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_adam_on_the_stated_loss(world: SmallWorld, kind: str) -> None:
    hyperparameters = KINDS[kind]
    pack, layer = trainer(world, hyperparameters), copy.deepcopy(world.layer).double()
    model = copy.deepcopy(pack.members[0].transcoder).double()
    sides = StatedSide(model.query, hyperparameters.query_side), StatedSide(model.key, hyperparameters.key_side)
    optimiser = torch.optim.Adam(model.parameters(), lr=hyperparameters.learning_rate, foreach=False)
    batch = world.training.batch_sequences
    for step in range(STEPS):
        numbers = batch_sequences(step, batch, STEPS_PLANNED * batch, SEED)
        x = world.cache.read(LAYER, "train", numbers).double()
        stated_step(model, sides, optimiser, x, layer, step / STEPS_PLANNED)
    pack.train(STEPS)
    (member,) = pack.members
    for name, parameter in member.transcoder.named_parameters():
        expected = dict(model.named_parameters())[name]
        # Adam's first steps divide a gradient by its own size: float32 noise in tiny gradients shows
        moved = STEPS * hyperparameters.learning_rate
        close = (parameter.double() - expected).abs() <= 0.02 * moved
        assert close.double().mean() > 0.99, name
    for name, side in zip(("query", "key"), sides, strict=True):
        penalty, activation = member.penalties[name], getattr(member.transcoder, name).activation
        assert penalty.coefficient.value.item() == pytest.approx(side.coefficient, rel=1e-3)
        if kind == "p-annealing":
            assert penalty.penalty.c.item() == pytest.approx(side.c, rel=1e-5)
        if kind.startswith("batchtopk"):
            assert activation.threshold.item() == pytest.approx(side.threshold, rel=1e-3)
