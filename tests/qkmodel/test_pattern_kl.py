"""The fused loss against the plain one in float64, gradients too."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkmodel.attention import AttentionLayer
from qkmodel.pattern_kl import BLOCK_ROWS, pattern_kl, pattern_target, reference_pattern_kl, row_kl
from tests.qkmodel.layers import random_layer

SHAPES = {
    "plain": dict(n_heads=4, n_kv_heads=4, rotary_dim=0),
    "grouped rotary": dict(n_heads=6, n_kv_heads=2, rotary_dim=16),
    "partial rotary": dict(n_heads=4, n_kv_heads=4, rotary_dim=4),
    "soft-cap": dict(n_heads=4, n_kv_heads=2, rotary_dim=16, soft_cap=1.5),
    "window": dict(n_heads=4, n_kv_heads=2, rotary_dim=16, window=5),
    "window over a block": dict(n_heads=2, n_kv_heads=1, rotary_dim=16, window=BLOCK_ROWS + 9),
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
    layer: AttentionLayer, sides: list[torch.Tensor], fused: bool
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    q_hat, k_hat = (side.clone().requires_grad_() for side in sides[:2])
    if fused:
        loss = pattern_kl(q_hat, k_hat, pattern_target(layer, *sides[2:]))
    else:
        loss = reference_pattern_kl(q_hat, k_hat, *sides[2:], layer)
    (2.0 * loss.total).backward()
    return [loss.total.detach(), loss.full, loss.query_only, loss.key_only], q_hat.grad, k_hat.grad


@pytest.mark.parametrize("context", [1, 7, BLOCK_ROWS, 2 * BLOCK_ROWS + 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_equals_plain_in_float64(shape: str, context: int) -> None:
    layer = random_layer(**SHAPES[shape]).double()
    sides = random_side(layer, batch=2, context=context, seed=context)
    fused, plain = losses_and_gradients(layer, sides, True), losses_and_gradients(layer, sides, False)
    for ours, theirs in zip(fused[0], plain[0], strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-11, atol=1e-12)
    for ours, theirs in zip(fused[1:], plain[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
def test_fused_in_float32_stays_close_to_float64(shape: str) -> None:
    layer = random_layer(**SHAPES[shape])
    sides = random_side(layer.double(), batch=2, context=40, seed=3)
    exact = losses_and_gradients(layer, sides, False)
    single = losses_and_gradients(layer.float(), [side.float() for side in sides], True)
    for ours, theirs in zip(single[0], exact[0], strict=True):
        torch.testing.assert_close(ours.double(), theirs.detach(), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(single[1:], exact[1:], strict=True):
        assert (ours.double() - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 30.0), context=st.integers(1, 90))
def test_loss_is_zero_at_the_truth_and_positive_elsewhere(seed: int, scale: float, context: int) -> None:
    layer = random_layer(n_heads=4, n_kv_heads=2, rotary_dim=8).double()
    q_hat, k_hat, q, k = random_side(layer, 1, context, seed, scale)
    target = pattern_target(layer, q, k)
    at_truth = pattern_kl(q, k, target)
    assert abs(at_truth.total.item()) <= 1e-9
    elsewhere = pattern_kl(q_hat, k_hat, target)
    assert min(elsewhere.full.item(), elsewhere.query_only.item(), elsewhere.key_only.item()) >= -1e-9


def test_the_future_does_not_reach_the_loss() -> None:
    layer = random_layer(n_heads=4, n_kv_heads=2, rotary_dim=16).double()
    q_hat, k_hat, q, k = random_side(layer, 1, 12, seed=0)
    whole = pattern_kl(q_hat[:, :9], k_hat[:, :9], pattern_target(layer, q[:, :9], k[:, :9])).full * 9
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
    loss = pattern_kl(q_hat, k_hat, pattern_target(layer, q, k))
    loss.total.backward()
    assert torch.isfinite(loss.total) and torch.isfinite(q_hat.grad).all()
