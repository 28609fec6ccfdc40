"""The pattern loss on a GPU, in the manner of flash attention: scores live in registers, none reaches memory.

With Δq = q̂ − q and Δk = k̂ − k the scores of the three terms are the true ones, q·k, plus

    full: Δq·k + q·Δk + Δq·Δk      queries only: Δq·k      keys only: q·Δk

so four products of a block serve all three terms and the true pattern, as many as the four plain scores q·k, q̂·k̂,
q̂·k, q·k̂ would take; but rounding a small difference to bfloat16 costs little, and the loss of a perfect
reconstruction is zero up to float32's rounding. From p ∝ exp(s) follows p̂ ∝ p·exp(Δs), so a row's KL is
log Σ p·exp(Δs) − Σ p·Δs, which needs no entropy; and ∂KL/∂ŝ = p̂ − p.

Once per batch the log-sum-exp of every row of true scores is stored. Per training come three launches: the row
normalisers log Σ p·exp(Δs) with the KLs, then dq by query blocks, then dk by key blocks. The last two recompute the
four products and add two each: sixteen products in all. One pass that accumulates Σ p̂·k and Σ p·k apart would take
thirteen, but loses p̂ − p to the rounding of p̂ and p as a training converges. Nothing is accumulated atomically:
equal inputs give equal bits. No launch waits for the GPU or depends on data, so CUDA graphs may capture all of it.

Tensors are [batch, context, heads, d_head]; blocks that no query may look at are never visited.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from qkmodel.attention import AttentionLayer
from qkmodel.kernels.pattern_kl_terms import Keys, Queries
from qkmodel.kernels.pattern_kl_triton_kernels import (
    key_gradient,
    query_gradient,
    row_normalisers,
    true_log_sums,
    turn,
)

# Numbers that a program turns: sixteen for each thread.
TURNED_AT_ONCE = 2048


class Tile(NamedTuple):
    """Positions a program keeps (`own`) and positions it takes in per iteration (`step`), with its launch options."""

    own: int
    step: int
    warps: int
    stages: int


@dataclass(frozen=True)
class TruePattern:
    """What every training of a pack compares itself with.

    `queries` are rotated and scaled, `keys` rotated; the `_product` forms are the same in the element type of the
    matrix products, and `log_sums` is the log-sum-exp of each row of their scores.
    """

    layer: AttentionLayer
    queries: Queries
    keys: Keys
    queries_product: Queries
    keys_product: Keys
    log_sums: Float[Tensor, "batch n_heads context"]


@torch.no_grad()
def true_pattern(layer: AttentionLayer, q: Queries, k: Keys, product_dtype: torch.dtype) -> TruePattern:
    """The true side of a batch, from the model's own queries and keys (before rotary)."""
    batch, context, n_heads, d_head = q.shape
    queries = (layer.rotate(q) * layer.geometry.scale).contiguous()
    keys = layer.rotate(k).contiguous()
    queries_product, keys_product = queries.to(product_dtype), keys.to(product_dtype)
    log_sums = torch.empty(batch, n_heads, context, dtype=torch.float32, device=q.device)
    tile = choose_tile(d_head, product_dtype)
    true_log_sums[_grid(batch * n_heads, context, tile)](
        queries_product, keys_product, log_sums, context, **_options(layer, context, tile)
    )
    return TruePattern(layer, queries, keys, queries_product, keys_product, log_sums)


@torch.no_grad()
def pattern_kl_gradients(q_hat: Queries, k_hat: Keys, true: TruePattern) -> tuple[Float[Tensor, "3"], Queries, Keys]:
    """KL (nats) of the full, the query-only and the key-only reconstruction, and the pattern loss's gradients.

    Memory beyond inputs and gradients: a few tensors of the inputs' size (rotation, Δq, Δk) and three numbers a row.
    """
    layer, scale = true.layer, true.layer.geometry.scale
    batch, context, n_heads, d_head = q_hat.shape
    n_kv_heads, rows = k_hat.shape[2], batch * context * n_heads
    tile = choose_tile(d_head, true.queries_product.dtype)
    options = _options(layer, context, tile)
    by_query, by_key = _grid(batch * n_heads, context, tile), _grid(batch * n_kv_heads, context, tile)

    query_changes = _turned(layer, q_hat, scale, true.queries, true.queries_product.dtype)
    key_changes = _turned(layer, k_hat, 1.0, true.keys, true.keys_product.dtype)
    sides = (true.queries_product, query_changes, true.keys_product, key_changes, true.log_sums)
    normalisers, sums = true.log_sums.new_empty(3, batch, n_heads, context), true.log_sums.new_empty(3, *by_query)
    dq, dk = torch.empty_like(true.queries), torch.empty_like(true.keys)
    row_normalisers[by_query](*sides, normalisers, sums, context, **options)
    query_gradient[by_query](*sides, normalisers, dq, scale / rows, context, **options)
    key_gradient[by_key](*sides, normalisers, dk, 1.0 / rows, context, **options)
    return sums.sum((1, 2)) / rows, _turned_back(layer, dq), _turned_back(layer, dk)


def choose_tile(d_head: int, product_dtype: torch.dtype) -> Tile:
    """Block sizes for head sizes up to 256; an H100's multiprocessor has 227 KiB of shared memory, 65,536 registers."""
    # Shared memory is (2·own + 2·step·stages) · depth · bytes per element: what is kept and what is taken in.
    # bfloat16: 32 KiB at depth 64, 64 at 128, 160 at 256. Tensor cores take 64 rows from every four warps. Compiled
    # for sm_90 a thread then has at most 170 registers up to depth 64, so three programs share a multiprocessor (a
    # step of 64 would take 240, and leave two); at depth 256 the gradient alone takes 128, hence the narrow step.
    # float32 cannot use tensor cores, and a thread keeps whole rows of its factors in registers, hence small tiles:
    # 28 KiB at depth 64; 34 at 128 and 66 at 256, where registers spill all the same and make it slow.
    depth = padded(d_head)
    if product_dtype == torch.float32:
        return Tile(own=32 if depth <= 64 else 16, step=16, warps=8, stages=1)
    return Tile(own=64, step=32, warps=4, stages=2) if depth <= 128 else Tile(own=128, step=16, warps=8, stages=2)


def _grid(sequences_heads: int, context: int, tile: Tile) -> tuple[int, int]:
    return sequences_heads, triton.cdiv(context, tile.own)


def _options(layer: AttentionLayer, context: int, tile: Tile) -> dict[str, int | float]:
    geometry = layer.geometry
    return {
        "window": context if geometry.window is None else min(geometry.window, context),
        "N_HEADS": geometry.n_heads,
        "N_KV_HEADS": geometry.n_kv_heads,
        "D_HEAD": geometry.d_head,
        "DEPTH": padded(geometry.d_head),
        "SOFT_CAP": geometry.soft_cap or 0.0,
        "OWN": tile.own,
        "STEP": tile.step,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def padded(d_head: int) -> int:
    """A head size that blocks can have: a power of two that tensor cores accept."""
    return max(16, triton.next_power_of_2(d_head))


def _turned(layer: AttentionLayer, y: Tensor, scale: float, base: Tensor, dtype: torch.dtype) -> Tensor:
    """scale · rotary(y) − base, rounded once."""
    return _turn(layer, y.contiguous(), scale, base, torch.empty_like(base, dtype=dtype), back=False)


def _turned_back(layer: AttentionLayer, gradient: Tensor) -> Tensor:
    """The transpose of `layer.rotate`."""
    if not layer.geometry.rotary_dim:
        return gradient
    return _turn(layer, gradient, 1.0, None, torch.empty_like(gradient), back=True)


def _turn(layer: AttentionLayer, y: Tensor, scale: float, base: Tensor | None, out: Tensor, back: bool) -> Tensor:
    geometry, (batch, context, heads, d_head) = layer.geometry, y.shape
    rows, depth = batch * context * heads, padded(d_head)
    own = max(1, TURNED_AT_ONCE // depth)
    # nothing is read where there is nothing to read
    cos, sin = layer.rotary_table(context) if geometry.rotary_dim else (y, y)
    turn[(triton.cdiv(rows, own),)](
        y, cos, sin, y if base is None else base, out, rows, context, scale,
        HEADS=heads, D_HEAD=d_head, DEPTH=depth, ROTARY=geometry.rotary_dim, INTERLEAVED=geometry.rotary_interleaved,
        BACK=back, HAS_BASE=base is not None, OWN=own,
    )  # fmt: skip
    return out
