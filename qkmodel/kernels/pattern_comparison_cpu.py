"""How far reconstructed patterns are from the true one, row by row, in one pass over the scores of a block.

Works on score differences, as `pattern_kl_cpu` does: log p̂ = log p + Δs − log Σ p·exp(Δs). All in float32.
"""

import numpy as np
import torch

from qkmodel.kernels.numerics_cpu import as_array, exponential, kernel
from qkmodel.kernels.pattern_kl_cpu import (
    Keys,
    Queries,
    TruePattern,
    group_size,
    pair_chunks,
    score_differences,
    soft_cap_differences,
)
from qkmodel.kernels.rotary_cpu import prepare

# "No BOS": key column 0 removed and rows renormalised, rows from the third on.
FIRST_NO_BOS_ROW = 2


class RowSums:
    """Sums over the rows of a pattern, in float64.

    `kl` [3, n_heads] and `kl_no_bos` [3] (nats) are of the full, the query-only and the key-only reconstruction;
    `top1` counts rows whose largest entry is at the same key, `error` sums max |p − p̂|, both of the full one.
    """

    def __init__(self, n_heads: int) -> None:
        self.kl: np.ndarray = np.zeros((3, n_heads))
        self.kl_no_bos: np.ndarray = np.zeros(3)
        self.top1_and_error: np.ndarray = np.zeros(2)


def add_rows(q_hat: Queries, k_hat: Keys, true: TruePattern, sums: RowSums) -> None:
    """Compares the patterns of reconstructed queries and keys (before rotary) with the true one."""
    geometry = true.layer.geometry
    difference_q, _ = prepare(true.layer, q_hat, true.queries, true.queries_product, geometry.scale)
    difference_k, _ = prepare(true.layer, k_hat, true.keys, true.keys_product, 1.0)
    for block in true.blocks:
        for pairs in pair_chunks(block, len(true.keys)):
            by_query, by_key, by_both = score_differences(true, block, pairs, difference_q, difference_k)
            heads = torch.arange(pairs.start, min(pairs.stop, len(true.keys))) % geometry.n_kv_heads
            _add_block(
                as_array(by_query),
                as_array(by_key),
                as_array(by_both),
                as_array(block.log_p[pairs]),
                as_array(block.raw[pairs]),
                block.p.numpy().dtype.type(geometry.soft_cap or 0.0),
                np.array([block.rows.start, block.columns.start, group_size(true)]),
                heads.numpy(),
                sums.kl,
                sums.kl_no_bos,
                sums.top1_and_error,
            )


@kernel
def _add_block(by_query, by_key, by_both, log_p, raw, soft_cap, origin, heads, kl, kl_no_bos, top1_and_error):
    first_position, first_column, group = origin
    width = log_p.shape[2]
    full, query, key = np.empty(width, log_p.dtype), np.empty(width, log_p.dtype), np.empty(width, log_p.dtype)
    unused = np.empty(width, log_p.dtype)
    for pair in range(log_p.shape[0]):
        for row in range(log_p.shape[1]):
            truth = log_p[pair, row]
            for j in range(width):
                query[j] = by_query[pair, row, j]
                key[j] = by_key[pair, row, j]
                full[j] = query[j] + key[j] + by_both[pair, row, j]
            if soft_cap > 0:
                soft_cap_differences(full, raw[pair, row], soft_cap, unused)
                soft_cap_differences(query, raw[pair, row], soft_cap, unused)
                soft_cap_differences(key, raw[pair, row], soft_cap, unused)
            head = heads[pair] * group + row % group
            kl[0, head] += _row_kl(full, truth, 0)
            kl[1, head] += _row_kl(query, truth, 0)
            kl[2, head] += _row_kl(key, truth, 0)
            if first_position + row // group >= FIRST_NO_BOS_ROW:
                start = 1 if first_column == 0 else 0
                kl_no_bos[0] += _row_kl(full, truth, start)
                kl_no_bos[1] += _row_kl(query, truth, start)
                kl_no_bos[2] += _row_kl(key, truth, start)
            same, error = _largest(full, truth)
            top1_and_error[0] += same
            top1_and_error[1] += error


@kernel
def _row_kl(delta, log_truth, start):
    """KL(p ‖ p̂) over the columns from `start` on, both renormalised there."""
    largest, largest_hat = log_truth[start], log_truth[start] + delta[start]
    for j in range(start, delta.size):
        largest = max(largest, log_truth[j])
        largest_hat = max(largest_hat, log_truth[j] + delta[j])
    total, total_hat, mean = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for j in range(start, delta.size):
        weight = exponential(log_truth[j] - largest)
        total += weight
        mean += weight * delta[j]
        total_hat += exponential(log_truth[j] + delta[j] - largest_hat)
    return np.float64(np.log(total_hat) + largest_hat) - np.float64(np.log(total) + largest) - mean / total


@kernel
def _largest(delta, log_truth):
    """Whether p and p̂ are largest at the same column, and max |p − p̂|."""
    best, best_hat = 0, 0
    largest, largest_hat = log_truth[0], log_truth[0] + delta[0]
    for j in range(1, delta.size):
        if log_truth[j] > largest:
            best, largest = j, log_truth[j]
        if log_truth[j] + delta[j] > largest_hat:
            best_hat, largest_hat = j, log_truth[j] + delta[j]
    total = np.float32(0.0)
    for j in range(delta.size):
        total += exponential(log_truth[j] + delta[j] - largest_hat)
    error, scale = np.float32(0.0), np.float32(1.0) / total
    for j in range(delta.size):
        p = exponential(log_truth[j])
        error = max(error, abs(p - scale * exponential(log_truth[j] + delta[j] - largest_hat)))
    return np.int64(best == best_hat), error
