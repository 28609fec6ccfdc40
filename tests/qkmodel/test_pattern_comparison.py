"""The CPU's fused comparison against the plain one, in every kind of layer."""

from typing import Any

import numpy as np
import pytest
import torch

from qkmodel.kernels import pattern_comparison_cpu, pattern_comparison_plain
from qkmodel.kernels.pattern_comparison_sums import RowSums
from qkmodel.pattern_kl import true_pattern
from tests.qkmodel.layers import random_layer

LAYERS: list[dict[str, Any]] = [
    {},
    {"n_heads": 3, "n_kv_heads": 1},
    {"rotary_dim": 0},
    {"window": 5},
    {"soft_cap": 2.0},
    {"window": 70, "soft_cap": 3.0},
]


def compared(geometry: dict[str, Any], context: int, noise: float, scale: float = 1.0) -> tuple[RowSums, RowSums]:
    """Sums by the fused form in float32, and by the plain one in float64."""
    layer = random_layer(**geometry)
    generator = torch.Generator().manual_seed(0)
    x = scale * torch.randn(3, context, layer.geometry.d_model, generator=generator)
    q, k = layer.project(x)
    q_hat, k_hat = (y + noise * torch.randn(y.shape, generator=generator) for y in (q, k))
    fused, plain = RowSums(layer.geometry.n_heads), RowSums(layer.geometry.n_heads)
    pattern_comparison_cpu.add_rows(q_hat, k_hat, true_pattern(layer, q, k, torch.float32), fused)
    exact = layer.double()
    pattern_comparison_plain.add_rows(q_hat.double(), k_hat.double(), exact, x.double(), plain)
    return fused, plain


@pytest.mark.parametrize("geometry", LAYERS, ids=str)
@pytest.mark.parametrize("context", [3, 64, 150])
@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_the_fused_form_gives_the_plain_ones_sums(geometry: dict[str, Any], context: int, noise: float) -> None:
    fused, plain = compared(geometry, context, noise)
    np.testing.assert_allclose(fused.kl, plain.kl, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fused.kl_no_bos, plain.kl_no_bos, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fused.top1_and_error[1], plain.top1_and_error[1], rtol=1e-4, atol=1e-5)
    assert fused.top1_and_error[0] == plain.top1_and_error[0]


def test_a_perfect_reconstruction_has_no_kl() -> None:
    fused, _ = compared({}, 150, noise=0.0)
    rows = 3 * 4 * 150
    assert np.abs(fused.kl).sum() / rows < 1e-6 and np.abs(fused.kl_no_bos).sum() / rows < 1e-6
    assert fused.top1_and_error[0] == rows


def test_scores_far_apart_stay_finite() -> None:
    fused, plain = compared({}, 80, noise=10.0, scale=40.0)
    assert np.isfinite(fused.kl).all() and np.isfinite(fused.kl_no_bos).all()
    np.testing.assert_allclose(fused.kl, plain.kl, rtol=1e-3)
    np.testing.assert_allclose(fused.kl_no_bos, plain.kl_no_bos, rtol=1e-3)
