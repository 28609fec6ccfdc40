"""JumpReLU, the annealed penalty, and which hyperparameters go together."""

import itertools
import math

import pytest
import torch
from pydantic import ValidationError

from qkmodel.hyperparameters import Hyperparameters
from qkmodel.sparsity import (
    FINAL_EXPONENT,
    JUMP_BANDWIDTH,
    PRE_ACTIVATION_WEIGHT,
    SQRT_EPSILON,
    TANH_SLOPE,
    AnnealedPenalty,
    JumpReLU,
    TanhPenalty,
    jump_penalty,
)


def jump(*thresholds: float) -> JumpReLU:
    activation = JumpReLU(len(thresholds))
    activation.log_threshold.data = torch.tensor(thresholds).log()
    return activation


def test_jumprelu_passes_what_is_above_its_threshold_unchanged() -> None:
    pre = torch.tensor([[0.5, 1.5, 3.0], [-2.0, 0.9, 2.1]])
    assert torch.equal(jump(1.0, 1.0, 2.0)(pre), torch.tensor([[0.0, 1.5, 3.0], [0.0, 0.0, 2.1]]))


def test_jumprelu_moves_thresholds_that_values_lie_close_to() -> None:
    activation, pre = jump(1.0, 1.0), torch.tensor([[1.1, 2.0]], requires_grad=True)
    activation(pre).sum().backward()
    # ∂f/∂log θ = −pre/ε inside the window |log(pre/θ)| < ε/2, and 0 outside
    assert activation.log_threshold.grad.tolist() == pytest.approx([-1.1 / JUMP_BANDWIDTH, 0.0])
    assert pre.grad.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_jumprelu_does_not_depend_on_the_scale_of_its_input(scale: float) -> None:
    activation = jump(scale, 2 * scale)
    pre = scale * torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) * 4
    jump_penalty(pre, activation, torch.zeros(2)).backward()
    reference = jump(1.0, 2.0)
    jump_penalty(pre / scale, reference, torch.zeros(2)).backward()
    torch.testing.assert_close(activation.log_threshold.grad, reference.log_threshold.grad, rtol=1e-2, atol=1e-2)


def test_jump_penalty_counts_and_lifts() -> None:
    pre = torch.tensor([[0.5, 1.5], [-1.0, 0.2]], requires_grad=True)
    norms = torch.tensor([2.0, 3.0])
    omega = jump_penalty(pre, jump(1.0, 1.0), norms)
    below = (0.5 * 2 + 2.0 * 2 + 0.8 * 3) / 2
    assert omega.item() == pytest.approx(1 / 2 + PRE_ACTIVATION_WEIGHT * below)
    omega.backward()
    # what lies below its threshold is pushed up, the rest left alone
    assert (pre.grad < 0).tolist() == [[True, False], [True, True]] and pre.grad[0, 1] == 0


def test_tanh_penalty_by_hand() -> None:
    a = torch.tensor([[0.0, 1.0], [0.25, 0.0]], dtype=torch.float64)
    assert TanhPenalty()(a, 2, 0.0).item() == pytest.approx((math.tanh(TANH_SLOPE) + math.tanh(TANH_SLOPE / 4)) / 2)


def test_annealing_starts_as_l1_and_never_jumps() -> None:
    a = torch.rand(50, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    penalty, steps = AnnealedPenalty(), 100
    values = [penalty(a, 50, step / steps).item() for step in range(steps + 1)]
    assert values[0] == pytest.approx(a.sum(-1).mean().item(), rel=1e-4)
    # the same activations cost almost the same from step to step, and the exponent arrives where it should
    assert max(abs(after / before - 1) for before, after in itertools.pairwise(values)) < 1e-4
    assert penalty.exponent.item() == pytest.approx(FINAL_EXPONENT)
    by_hand = ((a + SQRT_EPSILON) ** FINAL_EXPONENT - SQRT_EPSILON**FINAL_EXPONENT).sum(-1).mean()
    assert penalty(a, 50, 1.0).item() == pytest.approx(penalty.c.item() * by_hand.item(), rel=1e-4)


def test_annealing_ends_up_caring_about_how_many_rather_than_how_much() -> None:
    few = torch.tensor([[4.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    many = torch.ones(1, 4, dtype=torch.float64)
    assert AnnealedPenalty()(few, 1, 0.0).item() == pytest.approx(AnnealedPenalty()(many, 1, 0.0).item(), rel=1e-4)
    assert AnnealedPenalty._sum(few, torch.tensor(FINAL_EXPONENT)) < 0.5 * AnnealedPenalty._sum(
        many, torch.tensor(FINAL_EXPONENT)
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "topk"}, "needs k"),
        ({"activation": "batchtopk", "k": 4, "target_l0": 3}, "target_l0 belong to relu"),
        ({"activation": "topk", "k": 4, "key_k": 40}, "key_k 40 is larger than key_dictionary_size 32"),
        ({"activation": "topk", "k": 4, "key_dictionary_size": 2}, "key_k 4 is larger than key_dictionary_size 2"),
        ({"activation": "relu", "penalty": "l1"}, "needs sparsity_coefficient, or target_l0"),
        ({"activation": "relu", "sparsity_coefficient": 1.0}, "needs penalty"),
        ({"activation": "relu", "penalty": "l1", "sparsity_coefficient": 1.0, "target_l0": 3}, "exclude each other"),
        ({"activation": "relu", "penalty": "l1", "target_l0": 32}, "target_l0 32 is not below dictionary_size 32"),
        ({"activation": "relu", "penalty": "l1", "target_l0": 3, "key_sparsity_coefficient": 1.0}, "needs sparsity"),
        ({"activation": "jumprelu", "penalty": "l1", "sparsity_coefficient": 1.0}, "takes no penalty"),
        ({"activation": "jumprelu", "sparsity_coefficient": 1.0, "key_k": 2}, "k belongs to"),
        ({"activation": "jumprelu", "target_l0": 4}, "target_l0 belongs to activation relu"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Hyperparameters(dictionary_size=32, learning_rate=1e-3, **fields)


def test_each_side_may_have_its_own() -> None:
    both = Hyperparameters(
        dictionary_size=32, key_dictionary_size=16, activation="topk", k=4, key_k=2, learning_rate=1e-3
    )
    assert (both.query_side.dictionary_size, both.query_side.k) == (32, 4)
    assert (both.key_side.dictionary_size, both.key_side.k) == (16, 2)
