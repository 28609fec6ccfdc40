"""The loss: KL(true pattern ‖ reconstructed pattern), full and with one side reconstructed.

    pattern loss = 3·KL(p ‖ p̂(q̂,k̂)) + KL(p ‖ p̂(q̂,k)) + KL(p ‖ p̂(q,k̂))       (Wynroe & Sharkey 2024)

all means over batch × heads × query positions, in nats. The gradient of each term with respect to its
scores is p̂ − p, so nothing is differentiated through softmax and no score outlives its block.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from qkmodel.attention import AttentionLayer

FULL_WEIGHT = 3.0
# Rows of queries handled at once: small enough that one block's scores stay in a core's L2 cache.
BLOCK_ROWS = 64

Queries = Float[Tensor, "batch context n_heads d_head"]
Keys = Float[Tensor, "batch context n_kv_heads d_head"]
GroupedQueries = Float[Tensor, "batch n_kv_heads group context d_head"]
GroupedKeys = Float[Tensor, "batch n_kv_heads context d_head"]


@dataclass(frozen=True)
class PatternTarget:
    """What every training of a pack compares itself with: one batch's true side, computed once.

    `queries` are rotated and multiplied by the score scale, `keys` rotated; `pattern` [batch, n_kv_heads,
    group, context, context] is p; `negative_entropy` is the mean over rows of Σ p log p.
    """

    layer: AttentionLayer
    queries: GroupedQueries
    keys: GroupedKeys
    pattern: Float[Tensor, "batch n_kv_heads group context context"]
    negative_entropy: Float[Tensor, ""]


@dataclass(frozen=True)
class PatternLoss:
    """`total` carries the gradient; the three means (nats) are for reading."""

    total: Float[Tensor, ""]
    full: Float[Tensor, ""]
    query_only: Float[Tensor, ""]
    key_only: Float[Tensor, ""]


@torch.no_grad()
def pattern_target(layer: AttentionLayer, q: Queries, k: Keys) -> PatternTarget:
    """The true side of a batch, from the model's own queries and keys (before rotary)."""
    queries, keys = _group_queries(layer, q), _group_keys(layer, k)
    batch, kv_heads, group, context, _ = queries.shape
    pattern = queries.new_zeros(batch, kv_heads, group, context, context)
    negative_entropy = queries.new_zeros(())
    for rows, columns in _blocks(context, layer.geometry.window):
        scores = _masked(_raw_scores(layer, queries[:, :, :, rows], keys[:, :, columns]), rows, columns, layer)
        log_p = scores.log_softmax(-1)
        p = log_p.exp()
        pattern[..., rows, columns] = p
        negative_entropy += (p * log_p.masked_fill(p == 0, 0.0)).sum()
    return PatternTarget(layer, queries, keys, pattern, negative_entropy / (batch * kv_heads * group * context))


def pattern_kl(q_hat: Queries, k_hat: Keys, target: PatternTarget) -> PatternLoss:
    """The pattern loss of reconstructed queries and keys (before rotary), fused for the CPU.

    Memory beyond inputs and gradients: the scores of one block of rows of one sequence.
    """
    total, parts = _FusedPatternKL.apply(_group_queries(target.layer, q_hat), _group_keys(target.layer, k_hat), target)
    return PatternLoss(total, *parts.unbind())


def reference_pattern_kl(q_hat: Queries, k_hat: Keys, q: Queries, k: Keys, layer: AttentionLayer) -> PatternLoss:
    """The same loss written plainly, differentiated by autograd: what `pattern_kl` is tested against."""
    with torch.no_grad():
        log_p = layer.scores(q, k).log_softmax(-1)
    full = mean_kl(log_p, layer.scores(q_hat, k_hat).log_softmax(-1))
    query_only = mean_kl(log_p, layer.scores(q_hat, k).log_softmax(-1))
    key_only = mean_kl(log_p, layer.scores(q, k_hat).log_softmax(-1))
    return PatternLoss(FULL_WEIGHT * full + query_only + key_only, full, query_only, key_only)


def mean_kl(
    log_p: Float[Tensor, "batch n_heads rows columns"], log_p_hat: Float[Tensor, "batch n_heads rows columns"]
) -> Float[Tensor, ""]:
    """KL(p ‖ p̂) averaged over batch × heads × rows; masked entries (−inf in both) count as zero."""
    return row_kl(log_p, log_p_hat).mean()


def row_kl(log_p: Float[Tensor, "*rows columns"], log_p_hat: Float[Tensor, "*rows columns"]) -> Float[Tensor, "*rows"]:
    """KL(p ‖ p̂) of each row; masked entries (−inf in both) count as zero."""
    masked = log_p == float("-inf")
    return (log_p.exp() * (log_p - log_p_hat).masked_fill(masked, 0.0)).sum(-1)


class _FusedPatternKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, q_hat: GroupedQueries, k_hat: GroupedKeys, target: PatternTarget
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "3"]]:
        batch, kv_heads, group, context, _ = q_hat.shape
        rows_total = batch * kv_heads * group * context
        dq, dk = torch.zeros_like(q_hat), torch.zeros_like(k_hat)
        sums = q_hat.new_zeros(3)
        for b in range(batch):
            for rows, columns in _blocks(context, target.layer.geometry.window):
                _accumulate_block(q_hat[b], k_hat[b], target, b, rows, columns, dq[b], dk[b], sums)
        parts = sums / rows_total + target.negative_entropy
        ctx.save_for_backward(dq.div_(rows_total), dk.div_(rows_total))
        ctx.mark_non_differentiable(parts)
        return FULL_WEIGHT * parts[0] + parts[1] + parts[2], parts

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_total: Float[Tensor, ""], _grad_parts: Tensor
    ) -> tuple[GroupedQueries, GroupedKeys, None]:
        dq, dk = ctx.saved_tensors
        return dq * grad_total, dk * grad_total, None


def _accumulate_block(
    q_hat: Float[Tensor, "n_kv_heads group context d_head"],
    k_hat: Float[Tensor, "n_kv_heads context d_head"],
    target: PatternTarget,
    b: int,
    rows: slice,
    columns: slice,
    dq: Float[Tensor, "n_kv_heads group context d_head"],
    dk: Float[Tensor, "n_kv_heads context d_head"],
    sums: Float[Tensor, "3"],
) -> None:
    """Adds one block's Σ(lse(ŝ) − p·ŝ) of the three terms to `sums` and its gradients to `dq`, `dk`."""
    q_block, k_block = q_hat[:, :, rows].flatten(1, 2), k_hat[:, columns]
    true_q, true_k = target.queries[b, :, :, rows].flatten(1, 2), target.keys[b, :, columns]
    p = target.pattern[b, :, :, rows, columns].flatten(1, 2)
    group = q_hat.shape[1]

    g_full = _score_gradient(q_block, k_block, p, rows, columns, group, target.layer, sums[0]).mul_(FULL_WEIGHT)
    g_query = _score_gradient(q_block, true_k, p, rows, columns, group, target.layer, sums[1])
    g_key = _score_gradient(true_q, k_block, p, rows, columns, group, target.layer, sums[2])

    dq_block = torch.baddbmm(g_full @ k_block, g_query, true_k)
    dq[:, :, rows] = dq_block.unflatten(1, (group, -1))
    dk[:, columns] += torch.baddbmm(g_full.mT @ q_block, g_key.mT, true_q)


def _score_gradient(
    queries: Float[Tensor, "n_kv_heads group_rows d_head"],
    keys: Float[Tensor, "n_kv_heads columns d_head"],
    p: Float[Tensor, "n_kv_heads group_rows columns"],
    rows: slice,
    columns: slice,
    group: int,
    layer: AttentionLayer,
    kl_sum: Float[Tensor, ""],
) -> Float[Tensor, "n_kv_heads group_rows columns"]:
    """Adds Σ(lse(ŝ) − p·ŝ) to `kl_sum` and returns the gradient p̂ − p with respect to the uncapped scores."""
    soft_cap = layer.geometry.soft_cap
    scores = queries @ keys.mT
    if soft_cap is not None:
        scores = scores.div_(soft_cap).tanh_().mul_(soft_cap)
        slope = 1 - (scores / soft_cap).square_()
    kl_sum -= torch.dot(p.flatten(), scores.flatten())
    scores = _masked(scores.unflatten(1, (group, -1)), rows, columns, layer).flatten(1, 2)
    p_hat = scores.softmax(-1)
    # lse = ŝ − log p̂ at each row's largest entry, where p̂ cannot underflow
    kl_sum += (scores.amax(-1) - p_hat.amax(-1).log_()).sum()
    gradient = p_hat.sub_(p)
    return gradient.mul_(slope) if soft_cap is not None else gradient


def _raw_scores(
    layer: AttentionLayer, queries: GroupedQueries, keys: GroupedKeys
) -> Float[Tensor, "batch n_kv_heads group rows columns"]:
    scores = queries @ keys.unsqueeze(2).mT
    soft_cap = layer.geometry.soft_cap
    return scores if soft_cap is None else soft_cap * torch.tanh(scores / soft_cap)


def _masked(
    scores: Float[Tensor, "*heads rows columns"], rows: slice, columns: slice, layer: AttentionLayer
) -> Float[Tensor, "*heads rows columns"]:
    """Scores with −inf where the key is not visible, in place."""
    return scores.add_(_mask(rows.start, rows.stop, columns.start, layer.geometry.window))


@lru_cache(maxsize=256)
def _mask(row: int, row_stop: int, column: int, window: int | None) -> Float[Tensor, "rows columns"]:
    distance = torch.arange(row, row_stop)[:, None] - torch.arange(column, row_stop)[None, :]
    hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))


def _blocks(context: int, window: int | None) -> list[tuple[slice, slice]]:
    """Blocks of query rows with the key columns that any of their rows can see."""
    blocks = []
    for start in range(0, context, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, context)
        first = 0 if window is None else max(0, start - window + 1)
        blocks.append((slice(start, stop), slice(first, stop)))
    return blocks


def _group_queries(layer: AttentionLayer, q: Queries) -> GroupedQueries:
    """Rotated, scaled queries with the heads that share a key head side by side."""
    rotated = layer.rotate(q) * layer.geometry.scale
    return rotated.unflatten(2, (layer.geometry.n_kv_heads, -1)).permute(0, 2, 3, 1, 4).contiguous()


def _group_keys(layer: AttentionLayer, k: Keys) -> GroupedKeys:
    return layer.rotate(k).transpose(1, 2).contiguous()
