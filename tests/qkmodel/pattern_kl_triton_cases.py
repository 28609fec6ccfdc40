"""The GPU form of the pattern loss against the plain one in float64; run by `test_pattern_kl_triton`.

Runs on the GPU if there is one, else on the CPU in Triton's interpreter.
"""

from collections.abc import Iterator

import pytest
import torch
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from qkmodel.attention import AttentionLayer
from qkmodel.kernels.pattern_kl_triton import choose_tile, pattern_kl_gradients, true_pattern
from qkmodel.pattern_kl import reference_pattern_kl
from tests.qkmodel.layers import random_layer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
BLOCKS = {dtype: choose_tile(16, dtype).own for dtype in DTYPES}
CONTEXTS = [(dtype, context) for dtype, block in BLOCKS.items() for context in (2, 7, block, 2 * block + 5)]
# Largest deviation as a share of the largest value, of KLs and of gradients.
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-2, 2e-2)}
SHAPES = {
    "plain": dict(n_heads=2, n_kv_heads=2, rotary_dim=0),
    "grouped rotary": dict(n_heads=3, n_kv_heads=1, rotary_dim=16),
    "partial rotary": dict(n_heads=2, n_kv_heads=2, rotary_dim=4),
    "interleaved scaled rotary, odd head size": dict(
        n_heads=2, n_kv_heads=1, d_head=20, rotary_dim=8, rotary_interleaved=True, rotary_scaling=1.2
    ),
    "soft-cap": dict(n_heads=2, n_kv_heads=1, rotary_dim=16, soft_cap=1.5),
    "window": dict(n_heads=2, n_kv_heads=1, rotary_dim=16, window=5),
    "window over a float32 block": dict(n_heads=2, n_kv_heads=1, rotary_dim=16, window=BLOCKS[torch.float32] + 9),
    "window over a bfloat16 block": dict(n_heads=2, n_kv_heads=1, rotary_dim=16, window=BLOCKS[torch.bfloat16] + 9),
}


@pytest.fixture(autouse=True, scope="session")
def bfloat16_interpreter() -> Iterator[None]:
    """Lets the interpreter round to bfloat16 and multiply it as a GPU does.

    Triton 3.7.1's own rounds towards zero, and multiplies the bits of bfloat16 as if they were integers.
    """
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounding_cast(self: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(source.data.copy()).to(torch.bfloat16)
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, source, target)

    def float32_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: object) -> TensorHandle:
        return dot(self, self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", rounding_cast)
        patch.setattr(InterpreterBuilder, "create_fp_trunc", rounding_cast)
        patch.setattr(InterpreterBuilder, "create_dot", float32_dot)
        yield


def random_sides(layer: AttentionLayer, batch: int, context: int, seed: int, scale: float = 1.0) -> list[Tensor]:
    """q̂, k̂, q, k; the reconstructions half way between the truth and noise."""
    generator = torch.Generator().manual_seed(seed)
    geometry = layer.geometry
    q, k, noise_q, noise_k = (
        scale * torch.randn(batch, context, heads, geometry.d_head, generator=generator).to(DEVICE)
        for heads in (geometry.n_heads, geometry.n_kv_heads) * 2
    )
    return [(q + noise_q) / 2, (k + noise_k) / 2, q, k]


def gpu_form(layer: AttentionLayer, sides: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return pattern_kl_gradients(*sides[:2], true_pattern(layer, *sides[2:], dtype))


def reference(layer: AttentionLayer, sides: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 KLs and gradients of `reference_pattern_kl`."""
    exact = AttentionLayer.from_tensors(layer.geometry, layer.to_tensors()).to(DEVICE).double()
    q_hat, k_hat, q, k = (side.double() for side in sides)
    loss = reference_pattern_kl(q_hat.requires_grad_(), k_hat.requires_grad_(), q, k, exact)
    loss.total.backward()
    return torch.stack((loss.full, loss.query_only, loss.key_only)).detach(), q_hat.grad, k_hat.grad


def deviation(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return ((ours.double() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6)).item()


@pytest.mark.parametrize(("dtype", "context"), CONTEXTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(dtype: torch.dtype, shape: str, context: int) -> None:
    layer = random_layer(**SHAPES[shape]).to(DEVICE)
    sides = random_sides(layer, batch=2 if context < BLOCKS[dtype] else 1, context=context, seed=context)
    ours, theirs = gpu_form(layer, sides, dtype), reference(layer, sides)
    of_kl, of_gradients = TOLERANCES[dtype]
    assert deviation(ours[0], theirs[0]) <= of_kl
    assert deviation(ours[1], theirs[1]) <= of_gradients
    assert deviation(ours[2], theirs[2]) <= of_gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_that_sees_one_key_has_nothing_to_learn(dtype: torch.dtype, shape: str) -> None:
    layer = random_layer(**SHAPES[shape]).to(DEVICE)
    for result in gpu_form(layer, random_sides(layer, batch=2, context=1, seed=1), dtype):
        assert result.abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_size_of_several_tiles(dtype: torch.dtype) -> None:
    layer = random_layer(n_heads=1, n_kv_heads=1, d_head=128, rotary_dim=128).to(DEVICE)
    sides = random_sides(layer, batch=1, context=37, seed=0)
    for ours, theirs in zip(gpu_form(layer, sides, dtype), reference(layer, sides), strict=True):
        assert deviation(ours, theirs) <= TOLERANCES[dtype][1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_lost_at_the_truth(dtype: torch.dtype) -> None:
    layer = random_layer(n_heads=2, n_kv_heads=1, rotary_dim=8).to(DEVICE)
    _, _, q, k = random_sides(layer, batch=1, context=40, seed=0)
    kl, dq, dk = gpu_form(layer, [q, k, q, k], dtype)
    assert kl.abs().max() <= 1e-6 and dq.abs().max() <= 1e-8 and dk.abs().max() <= 1e-8


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_future_does_not_reach_the_loss(dtype: torch.dtype) -> None:
    layer = random_layer(n_heads=2, n_kv_heads=1, rotary_dim=16).to(DEVICE)
    present, context = 45, 70
    sides = random_sides(layer, batch=1, context=context, seed=0)
    changed = [side.clone() for side in sides]
    for side in changed:
        side[:, present:] += 100.0
    true, changed_true = true_pattern(layer, *sides[2:], dtype), true_pattern(layer, *changed[2:], dtype)
    dq, changed_dq = pattern_kl_gradients(*sides[:2], true)[1], pattern_kl_gradients(*changed[:2], changed_true)[1]
    assert torch.equal(true.log_sums[..., :present], changed_true.log_sums[..., :present])
    assert torch.equal(dq[:, :present], changed_dq[:, :present])
    # and the rows of the present make the loss that a context without a future has
    alone = gpu_form(layer, [side[:, :present] for side in sides], dtype)
    torch.testing.assert_close(dq[:, :present] * (context / present), alone[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft_cap", [None, 30.0])
def test_extreme_scores_stay_finite(dtype: torch.dtype, soft_cap: float | None) -> None:
    layer = random_layer(n_heads=2, n_kv_heads=2, rotary_dim=0, soft_cap=soft_cap).to(DEVICE)
    for result in gpu_form(layer, random_sides(layer, batch=1, context=70, seed=1, scale=100.0), dtype):
        assert torch.isfinite(result).all()


def test_equal_inputs_give_equal_bits() -> None:
    layer = random_layer(n_heads=2, n_kv_heads=1, rotary_dim=16).to(DEVICE)
    sides = random_sides(layer, batch=1, context=70, seed=2)
    for first, second in zip(*(gpu_form(layer, sides, torch.bfloat16) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def test_inputs_in_any_memory_order() -> None:
    layer = random_layer(n_heads=2, n_kv_heads=2, rotary_dim=0).to(DEVICE)
    sides = random_sides(layer, batch=2, context=9, seed=3)
    strided = [side.transpose(1, 2).contiguous().transpose(1, 2) for side in sides]
    for ours, theirs in zip(*(gpu_form(layer, some, torch.float32) for some in (strided, sides)), strict=True):
        assert torch.equal(ours, theirs)


class Watch(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returns, and which operations ran."""

    def __init__(self) -> None:
        super().__init__()
        self.largest_bytes, self.operations = 0, set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        self.operations.add(function.name())
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.largest_bytes = max(self.largest_bytes, tensor.untyped_storage().nbytes())
        return result


def test_nothing_quadratic_is_allocated_and_nothing_waits_for_a_value() -> None:
    layer = random_layer(n_heads=2, n_kv_heads=1, rotary_dim=16).to(DEVICE)
    context = 133
    sides = random_sides(layer, batch=1, context=context, seed=4)
    with Watch() as watch:
        gpu_form(layer, sides, torch.bfloat16)
    assert watch.largest_bytes <= sides[0].nbytes < context**2 * torch.bfloat16.itemsize
    assert not watch.operations & {"aten::_local_scalar_dense", "aten::nonzero", "aten::item"}
