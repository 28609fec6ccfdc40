"""The pattern loss on a CPU: blocks of query rows, of which no score outlives the block.

With Δq = q̂ − q and Δk = k̂ − k the scores of the three terms are the true ones plus

    full: Δq·k + q·Δk + Δq·Δk      queries only: Δq·k      keys only: q·Δk

so three products of small differences serve all of them, and rounding these products to bfloat16 costs little.
From p ∝ exp(s) follows p̂ ∝ p·exp(Δs), so a row's KL is log Σ p·exp(Δs) − Σ p·Δs; and ∂KL/∂ŝ = p̂ − p, so the
gradients are known as soon as the row is. Key positions that no row of a block can see are never computed.

`pairs` counts key heads of sequences, batch · n_kv_heads. The query heads of a group are the innermost rows, so
that the queries of a block of positions lie together.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qkmodel.attention import AttentionLayer
from qkmodel.kernels.machine_code import inlined, kernel
from qkmodel.kernels.numerics_cpu import as_array, exponential, larger, number, store
from qkmodel.kernels.pattern_kl_terms import FULL_WEIGHT, Keys, Queries
from qkmodel.kernels.rotary_cpu import prepare, restore

# Query positions in a block, and scores handled at once: within a tenth of the fastest tried on SmolLM2's shapes.
BLOCK_POSITIONS = 64
BLOCK_SCORES = 640_000


@dataclass(frozen=True)
class TrueBlock:
    """One block of the true pattern: query positions `rows`, key positions `columns`.

    `raw` are the scores before the soft-cap, of length 0 in layers that have none.
    """

    rows: slice
    columns: slice
    log_p: Float[Tensor, "pairs rows_group columns"]
    p: Float[Tensor, "pairs rows_group columns"]
    raw: Float[Tensor, "pairs rows_group columns"]


@dataclass(frozen=True)
class TruePattern:
    """What every training of a pack compares itself with.

    `queries` are rotated and scaled, `keys` rotated; the `_product` forms are the same in the element type of the
    matrix products. Memory: 8 bytes for each score of the batch's blocks (12 with a soft-cap).
    """

    layer: AttentionLayer
    queries: Float[Tensor, "pairs context_group d_head"]
    keys: Float[Tensor, "pairs context d_head"]
    queries_product: Float[Tensor, "pairs context_group d_head"]
    keys_product: Float[Tensor, "pairs context d_head"]
    blocks: list[TrueBlock]


def true_pattern(layer: AttentionLayer, q: Queries, k: Keys, product_dtype: torch.dtype) -> TruePattern:
    """The true side of a batch, from the model's own queries and keys (before rotary)."""
    geometry = layer.geometry
    context, group = q.shape[1], geometry.n_heads // geometry.n_kv_heads
    queries = (layer.rotate(q) * geometry.scale).unflatten(2, (-1, group)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    queries, keys = queries.contiguous(), layer.rotate(k).transpose(1, 2).flatten(0, 1).contiguous()
    blocks = []
    for rows, columns in blocks_of(context, geometry.window):
        raw = queries[:, rows.start * group : rows.stop * group] @ keys[:, columns].mT
        cap = geometry.soft_cap
        scores = raw if cap is None else torch.tanh(raw / cap) * cap
        mask = _mask(rows.start, rows.stop, columns.start, geometry.window).repeat_interleave(group, 0)
        log_p = (scores + mask.to(scores.dtype)).log_softmax(-1)
        # without a soft-cap not even a view: it would keep the scores
        kept = raw if cap is not None else raw.new_empty(0, *raw.shape[1:])
        blocks.append(TrueBlock(rows, columns, log_p, log_p.exp(), kept))
    return TruePattern(layer, queries, keys, queries.to(product_dtype), keys.to(product_dtype), blocks)


def pattern_kl_gradients(q_hat: Queries, k_hat: Keys, true: TruePattern) -> tuple[Float[Tensor, "3"], Queries, Keys]:
    """KL (nats) of the full, the query-only and the key-only reconstruction, and the pattern loss's gradients.

    Memory beyond inputs and gradients: seven times the larger of `BLOCK_SCORES` scores and one pair's block.
    """
    geometry = true.layer.geometry
    rows = q_hat[..., 0].numel()
    difference_q, both_q = prepare(true.layer, q_hat, true.queries, true.queries_product, geometry.scale)
    difference_k, both_k = prepare(true.layer, k_hat, true.keys, true.keys_product, 1.0)
    dq, dk = torch.empty_like(difference_q), torch.zeros_like(true.keys)
    sums = np.zeros(3)
    for block in true.blocks:
        for pairs in pair_chunks(block, len(dk)):
            differences = score_differences(true, block, pairs, difference_q, difference_k)
            for_q, for_k = _block_gradients(true, block, pairs, differences, sums)
            positions = _rows(true, block)
            dq[pairs, positions] = torch.bmm(for_q, both_k[pairs, block.columns].flatten(1, 2))
            dk[pairs, block.columns] += torch.bmm(for_k.mT, both_q[pairs, positions].flatten(1, 2))
    parts = torch.from_numpy(sums / rows).to(q_hat.dtype)
    return (
        parts,
        restore(true.layer, dq, q_hat.shape, geometry.scale / rows),
        restore(true.layer, dk, k_hat.shape, 1.0 / rows),
    )


def pair_chunks(block: TrueBlock, pairs: int) -> list[slice]:
    """Pairs whose scores in this block are handled together: so many that Python's share of the time is small."""
    size = max(1, BLOCK_SCORES // block.p[0].numel())
    return [slice(start, start + size) for start in range(0, pairs, size)]


def score_differences(
    true: TruePattern,
    block: TrueBlock,
    pairs: slice,
    difference_q: Float[Tensor, "pairs context_group d_head"],
    difference_k: Float[Tensor, "pairs context d_head"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Δq·k, q·Δk and Δq·Δk [chunk, rows_group, columns] of a block."""
    rows = _rows(true, block)
    dq_rows, dk_columns = difference_q[pairs, rows], difference_k[pairs, block.columns].mT
    return (
        torch.bmm(dq_rows, true.keys_product[pairs, block.columns].mT),
        torch.bmm(true.queries_product[pairs, rows], dk_columns),
        torch.bmm(dq_rows, dk_columns),
    )


def group_size(true: TruePattern) -> int:
    """Query heads that share a key head."""
    return true.queries.shape[1] // true.keys.shape[1]


def _rows(true: TruePattern, block: TrueBlock) -> slice:
    group = group_size(true)
    return slice(block.rows.start * group, block.rows.stop * group)


def _block_gradients(
    true: TruePattern, block: TrueBlock, pairs: slice, differences: tuple[Tensor, Tensor, Tensor], sums: np.ndarray
) -> tuple[Float[Tensor, "chunk rows_group 2_columns"], Float[Tensor, "chunk 2_rows_group columns"]]:
    """Adds one block's KL of the three terms to `sums`; returns its gradients with respect to the scores.

    3·(p̂ − p) of the full term beside p̂ − p of the query-only term, column by column, and above that of the key-only
    term, row by row: so that one product each makes the gradients of queries and keys.
    """
    by_query, by_key, by_both = differences
    count, height, width = by_query.shape
    for_q = by_query.new_empty(count, height, 2 * width)
    for_k = by_query.new_empty(count, 2 * height, width)
    _softmax_gradients(
        as_array(by_query),
        as_array(by_key),
        as_array(by_both),
        as_array(block.log_p[pairs]),
        as_array(block.p[pairs]),
        as_array(block.raw[pairs]),
        block.p.numpy().dtype.type(true.layer.geometry.soft_cap or 0.0),
        sums,
        as_array(for_q),
        as_array(for_k),
    )
    return for_q, for_k


@kernel
def _softmax_gradients(by_query, by_key, by_both, log_p, p, raw, soft_cap, sums, for_q, for_k):
    # LLVM vectorises a loop only if it writes few arrays: hence many short loops over rows that stay in L1
    pairs, height, width = log_p.shape
    capped = soft_cap > 0
    full, query, key = np.empty(width, p.dtype), np.empty(width, p.dtype), np.empty(width, p.dtype)
    full_slope, query_slope, key_slope = np.ones(width, p.dtype), np.ones(width, p.dtype), np.ones(width, p.dtype)
    full_weight, one, lowest = p.dtype.type(FULL_WEIGHT), p.dtype.type(1.0), p.dtype.type(-np.inf)
    for pair in range(pairs):
        for row in range(height):
            truth, log_truth = p[pair, row], log_p[pair, row]
            for j in range(width):
                query[j] = number(by_query[pair, row, j])
            for j in range(width):
                key[j] = number(by_key[pair, row, j])
            for j in range(width):
                full[j] = query[j] + key[j] + number(by_both[pair, row, j])
            if capped:
                soft_cap_differences(full, raw[pair, row], soft_cap, full_slope)
                soft_cap_differences(query, raw[pair, row], soft_cap, query_slope)
                soft_cap_differences(key, raw[pair, row], soft_cap, key_slope)
            full_mean = _add_log_truth(full, truth, log_truth)
            query_mean = _add_log_truth(query, truth, log_truth)
            key_mean = _add_log_truth(key, truth, log_truth)
            full_max, query_max, key_max = lowest, lowest, lowest
            for j in range(width):
                full_max = larger(full_max, full[j])
                query_max = larger(query_max, query[j])
                key_max = larger(key_max, key[j])
            full_sum = _exponentials(full, full_max)
            query_sum = _exponentials(query, query_max)
            key_sum = _exponentials(key, key_max)
            sums[0] += np.log(full_sum) + full_max - full_mean
            sums[1] += np.log(query_sum) + query_max - query_mean
            sums[2] += np.log(key_sum) + key_max - key_mean
            _gradients(full, full_weight / full_sum, truth, full_weight, capped, full_slope)
            _gradients(query, one / query_sum, truth, one, capped, query_slope)
            _gradients(key, one / key_sum, truth, one, capped, key_slope)
            for j in range(width):
                store(for_q[pair], row, 2 * j, full[j])
                store(for_q[pair], row, 2 * j + 1, query[j])
            for j in range(width):
                store(for_k[pair], 2 * row, j, full[j])
            for j in range(width):
                store(for_k[pair], 2 * row + 1, j, key[j])


@inlined
def _add_log_truth(delta, truth, log_truth):
    """Turns Δs into Δs + log p and returns Σ p·Δs."""
    mean = delta.dtype.type(0.0)
    for j in range(delta.size):
        mean += truth[j] * delta[j]
        delta[j] += log_truth[j]
    return mean


@inlined
def _exponentials(scores, largest):
    """Turns scores into exp(score − largest) and returns their sum."""
    total = scores.dtype.type(0.0)
    for j in range(scores.size):
        scores[j] = exponential(scores[j] - largest)
        total += scores[j]
    return total


@inlined
def _gradients(exponentials, scale, truth, weight, capped, slope):
    """Turns exponentials into weight · (p̂ − p), times the soft-cap's slope if there is one."""
    for j in range(exponentials.size):
        exponentials[j] = exponentials[j] * scale - weight * truth[j]
    if capped:
        for j in range(exponentials.size):
            exponentials[j] *= slope[j]


@inlined
def soft_cap_differences(delta, raw, soft_cap, slope):
    """Turns differences of raw scores into differences of soft-capped ones; `slope` is the cap's at ŝ."""
    for j in range(delta.size):
        capped = np.tanh((raw[j] + delta[j]) / soft_cap)
        delta[j] = soft_cap * (capped - np.tanh(raw[j] / soft_cap))
        slope[j] = slope.dtype.type(1.0) - capped * capped


@lru_cache(maxsize=256)
def _mask(row: int, row_stop: int, column: int, window: int | None) -> Float[Tensor, "rows columns"]:
    distance = torch.arange(row, row_stop)[:, None] - torch.arange(column, row_stop)[None, :]
    hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))


def blocks_of(context: int, window: int | None) -> list[tuple[slice, slice]]:
    """Blocks of query positions with the key positions that any of them can see.

    Memory is taken for all scores of a block, those above the diagonal too.
    """
    blocks = []
    for start in range(0, context, BLOCK_POSITIONS):
        stop = min(start + BLOCK_POSITIONS, context)
        first = 0 if window is None else max(0, start - window + 1)
        blocks.append((slice(start, stop), slice(first, stop)))
    return blocks
