"""The GPU form of sparse transcoders against the CPU's and against autograd in float64; run by `test_sparse_triton`.

Runs on the GPU if there is one, else on the CPU in Triton's interpreter.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from qkmodel.kernels import choice_cpu
from qkmodel.kernels.sparse_triton import Chosen, SparseTopK, choose

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# width, k, d_in, d_out: powers of two and not, and a k that no program takes in whole steps
SHAPES = [(64, 4, 16, 16), (50, 3, 24, 20), (1030, 16, 33, 65), (20, 1, 8, 8)]


def chosen_by_cpu(pre: Tensor, k: int) -> list[list[int]]:
    bits = pre.view(torch.int16 if pre.dtype == torch.bfloat16 else torch.int32).cpu().numpy()
    starts, features = np.empty(len(bits) + 1, np.int64), np.empty(len(bits) * k, np.int32)
    choice_cpu.choose_largest(bits, k, starts, features)
    return [features[first:last].tolist() for first, last in pairwise(starts)]


def rows_of(chosen: Chosen) -> list[list[int]]:
    rows = zip(chosen.features.tolist(), chosen.counts.tolist(), strict=True)
    return [sorted(features[:count]) for features, count in rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 50, 1030])
@pytest.mark.parametrize("kind", ["normal", "ties", "few positive", "none positive", "extreme"])
def test_chooses_what_the_cpu_chooses(kind: str, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    pre = torch.randn(11, width, generator=generator)
    pre = {
        "normal": pre,
        "ties": (pre * 2).round(),
        "few positive": pre - 3,
        "none positive": -pre.abs(),
        "extreme": torch.where(pre > 1, torch.inf, pre * 1e30),
    }[kind].to(dtype)
    assert rows_of(choose(pre.to(DEVICE), 7)) == chosen_by_cpu(pre, 7)


def weights_and_inputs(width: int, d_in: int, d_out: int, tokens: int) -> list[Tensor]:
    """W_enc, b_enc, W_dec, b_out, x"""
    generator = torch.Generator().manual_seed(width)
    shapes = ((width, d_in), (width,), (width, d_out), (d_out,), (tokens, d_in))
    return [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]


def exactly(weights: list[Tensor], x: Tensor, chosen: Chosen) -> Tensor:
    """y by dense operations in the element type of the arguments."""
    w_enc, b_enc, w_dec, b_out = weights
    among = torch.zeros(len(x), len(w_enc), device=x.device, dtype=torch.bool)
    for token, features in enumerate(rows_of(chosen)):
        among[token, features] = True
    return torch.where(among, torch.relu(x @ w_enc.mT + b_enc), 0.0) @ w_dec + b_out


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("width", "k", "d_in", "d_out"), SHAPES)
def test_equals_dense_autograd(width: int, k: int, d_in: int, d_out: int, dtype: torch.dtype, tolerance: float) -> None:
    *weights, x = weights_and_inputs(width, d_in, d_out, tokens=40)
    # some tokens have fewer than k positive pre-activations, and of others some are chosen that are none
    weights[1] -= 2 * d_in**0.5
    errors = torch.linspace(4 * d_in**0.5, -(d_in**0.5), 40, device=DEVICE)[:, None]
    pre = (x @ weights[0].mT + weights[1] + errors).to(dtype)
    chosen = choose(pre, k)
    ours = [weight.clone().requires_grad_() for weight in weights]
    y, values, active = SparseTopK.apply(*ours, x, x.to(dtype), chosen)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    y.backward(dy)
    theirs = [weight.double().requires_grad_() for weight in weights]
    exact = exactly(theirs, x.double(), chosen)
    exact.backward(dy.double())
    assert deviation(y, exact) <= 1e-5
    assert torch.equal((values > 0).sum(1), active.long()) and (active <= chosen.counts).all()
    assert chosen.counts.min() < k and (active < chosen.counts).any()
    for one, other in zip(ours, theirs, strict=True):
        assert deviation(one.grad, other.grad) <= tolerance


def test_equal_inputs_give_equal_bits() -> None:
    *weights, x = weights_and_inputs(1030, 33, 65, tokens=64)
    results = []
    for _ in range(2):
        ours = [weight.clone().requires_grad_() for weight in weights]
        chosen = choose((x @ weights[0].mT).bfloat16(), 16)
        y, *_ = SparseTopK.apply(*ours, x, x.bfloat16(), chosen)
        y.square().sum().backward()
        results.append([y, *(one.grad for one in ours)])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_the_order_in_which_features_were_found_does_not_matter() -> None:
    *weights, x = weights_and_inputs(1030, 33, 65, tokens=64)
    chosen = choose((x @ weights[0].mT).bfloat16(), 16)
    other = Chosen(chosen.features.flip(1).contiguous(), chosen.counts)
    assert chosen.counts.min() == 16
    (first, *_), (second, *_) = (SparseTopK.apply(*weights, x, x.bfloat16(), one) for one in (chosen, other))
    assert torch.equal(first, second) and torch.equal(chosen.features, other.features)


def deviation(ours: Tensor, exact: Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return ((ours.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-6)).item()
