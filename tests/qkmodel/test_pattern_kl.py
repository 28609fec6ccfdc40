"""The fused loss against the plain one in float64, gradients too."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkmodel.attention import AttentionLayer
from qkmodel.kernels.pattern_kl_cpu import BLOCK_POSITIONS
from qkmodel.pattern_kl import pattern_kl, reference_pattern_kl, row_kl, true_pattern
from tests.qkmodel.layers import random_layer

SHAPES = {
    "plain": dict(n_heads=4, n_kv_heads=4, rotary_dim=0),
    "grouped rotary": dict(n_heads=6, n_kv_heads=2, rotary_dim=16),
    "partial rotary": dict(n_heads=4, n_kv_heads=4, rotary_dim=4),
    "interleaved rotary": dict(n_heads=4, n_kv_heads=2, rotary_dim=8, rotary_interleaved=True, rotary_scaling=1.2),
    "soft-cap": dict(n_heads=4, n_kv_heads=2, rotary_dim=16, soft_cap=1.5),
    "window": dict(n_heads=4, n_kv_heads=2, rotary_dim=16, window=5),
    "window over a block": dict(n_heads=2, n_kv_heads=1, rotary_dim=16, window=BLOCK_POSITIONS + 9),
}


def random_side(layer: AttentionLayer, batch: int, context: int, seed: int, scale: float = 1.0) -> list[torch.Tensor]:
    """q̂, k̂, q, k in float64."""
    generator = torch.Generator().manual_seed(seed)
    geometry = layer.geometry
    heads = (geometry.n_heads, geometry.n_kv_heads) * 2
    return [
        scale * torch.randn(batch, context, n, geometry.d_head, generator=generator, dtype=torch.float64) for n in heads
    ]


def losses_and_gradients(
    layer: AttentionLayer, sides: list[torch.Tensor], products: torch.dtype | None
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    q_hat, k_hat = (side.clone().requires_grad_() for side in sides[:2])
    if products is not None:
        loss = pattern_kl(q_hat, k_hat, true_pattern(layer, *sides[2:], products))
    else:
        loss = reference_pattern_kl(q_hat, k_hat, *sides[2:], layer)
    (2.0 * loss.total).backward()
    return [loss.total.detach(), loss.full, loss.query_only, loss.key_only], q_hat.grad, k_hat.grad


@pytest.mark.parametrize("context", [1, 7, BLOCK_POSITIONS, 2 * BLOCK_POSITIONS + 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_equals_plain_in_float64(shape: str, context: int) -> None:
    layer = random_layer(**SHAPES[shape]).double()
    sides = random_side(layer, batch=2, context=context, seed=context)
    fused, plain = losses_and_gradients(layer, sides, torch.float64), losses_and_gradients(layer, sides, None)
    for ours, theirs in zip(fused[0], plain[0], strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-11, atol=1e-12)
    for ours, theirs in zip(fused[1:], plain[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    ("products", "on_values", "on_gradients"), [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 5e-3, 2e-2)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_with_rounded_products_stays_close_to_float64(
    shape: str, products: torch.dtype, on_values: float, on_gradients: float
) -> None:
    layer = random_layer(**SHAPES[shape])
    sides = random_side(layer.double(), batch=2, context=40, seed=3)
    exact = losses_and_gradients(layer, sides, None)
    single = losses_and_gradients(layer.float(), [side.float() for side in sides], products)
    for ours, theirs in zip(single[0], exact[0], strict=True):
        torch.testing.assert_close(ours.double(), theirs.detach(), rtol=on_values, atol=1e-5)
    for ours, theirs in zip(single[1:], exact[1:], strict=True):
        assert (ours.double() - theirs).abs().max() <= on_gradients * theirs.abs().max()


def test_rounding_matters_less_the_closer_the_reconstruction() -> None:
    """Rounded are differences, not scores: near the truth even large scores lose nothing."""
    layer = random_layer(n_heads=4, n_kv_heads=2, rotary_dim=16)
    q_hat, k_hat, q, k = random_side(layer.double(), batch=2, context=40, seed=3, scale=5.0)
    sides = [q + 1e-3 * q_hat, k + 1e-3 * k_hat, q, k]
    exact = losses_and_gradients(layer, sides, None)
    rounded = losses_and_gradients(layer.float(), [side.float() for side in sides], torch.bfloat16)
    torch.testing.assert_close(rounded[0][0].double(), exact[0][0], rtol=2e-2, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 30.0), context=st.integers(1, 90))
def test_loss_is_zero_at_the_truth_and_positive_elsewhere(seed: int, scale: float, context: int) -> None:
    layer = random_layer(n_heads=4, n_kv_heads=2, rotary_dim=8).double()
    q_hat, k_hat, q, k = random_side(layer, 1, context, seed, scale)
    true = true_pattern(layer, q, k, torch.float64)
    at_truth = pattern_kl(q, k, true)
    assert abs(at_truth.total.item()) <= 1e-9
    elsewhere = pattern_kl(q_hat, k_hat, true)
    assert min(elsewhere.full.item(), elsewhere.query_only.item(), elsewhere.key_only.item()) >= -1e-9


def test_the_future_does_not_reach_the_loss() -> None:
    layer = random_layer(n_heads=4, n_kv_heads=2, rotary_dim=16).double()
    q_hat, k_hat, q, k = random_side(layer, 1, 12, seed=0)
    whole = pattern_kl(q_hat[:, :9], k_hat[:, :9], true_pattern(layer, q[:, :9], k[:, :9], torch.float64)).full * 9
    changed_k, changed_k_hat = k.clone(), k_hat.clone()
    changed_k[:, 9:] += 100.0
    changed_k_hat[:, 9:] -= 100.0
    log_p = layer.scores(q, changed_k).log_softmax(-1)[:, :, :9]
    log_p_hat = layer.scores(q_hat, changed_k_hat).log_softmax(-1)[:, :, :9]
    torch.testing.assert_close(row_kl(log_p, log_p_hat).mean() * 9, whole)


def test_extreme_scores_stay_finite() -> None:
    layer = random_layer(n_heads=4, n_kv_heads=4, rotary_dim=0)
    q_hat, k_hat, q, k = (side.float() for side in random_side(layer, 1, 16, seed=1, scale=100.0))
    q_hat.requires_grad_()
    loss = pattern_kl(q_hat, k_hat, true_pattern(layer, q, k, torch.bfloat16))
    loss.total.backward()
    assert torch.isfinite(loss.total) and torch.isfinite(q_hat.grad).all()
