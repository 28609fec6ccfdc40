"""How far reconstructed patterns are from the true one, row by row, in one pass over the scores of a block.

Works on score differences, as `pattern_kl_cpu` does: log p̂ = log p + Δs − log Σ p·exp(Δs). All in float32.
"""

import numpy as np
import torch

from qkmodel.kernels.machine_code import inlined, kernel
from qkmodel.kernels.numerics_cpu import as_array, exponential, larger
from qkmodel.kernels.pattern_comparison_sums import FIRST_NO_BOS_ROW, RowSums
from qkmodel.kernels.pattern_kl_cpu import (
    TruePattern,
    group_size,
    pair_chunks,
    score_differences,
    soft_cap_differences,
)
from qkmodel.kernels.pattern_kl_terms import Keys, Queries
from qkmodel.kernels.rotary_cpu import prepare


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
    # "no BOS" leaves column 0 out: it is kept apart, so that one pass over the others serves both figures
    apart = first_column == 0
    start = 1 if apart else 0
    weights, unused = np.empty(width - start, log_p.dtype), np.empty(width, log_p.dtype)
    for pair in range(log_p.shape[0]):
        for row in range(log_p.shape[1]):
            position = first_position + row // group
            if position == 0:
                # one key: nothing to get wrong
                top1_and_error[0] += 1
                continue
            log_truth = log_p[pair, row]
            for j in range(width):
                query[j] = by_query[pair, row, j]
                key[j] = by_key[pair, row, j]
                full[j] = query[j] + key[j] + by_both[pair, row, j]
            if soft_cap > 0:
                soft_cap_differences(full, raw[pair, row], soft_cap, unused)
                soft_cap_differences(query, raw[pair, row], soft_cap, unused)
                soft_cap_differences(key, raw[pair, row], soft_cap, unused)
            top1_and_error[0] += _same_largest(full, log_truth)
            rest, first = log_truth[start:], np.float64(log_truth[0])
            largest = _maximum(rest)
            for j in range(rest.size):
                weights[j] = rest[j] - largest
            total = _exponentials(weights)
            head = heads[pair] * group + row % group
            scores = (rest, weights, largest, total, apart, first)
            full_kl, full_rest_kl, largest_hat, log_sum = _row_kl(full[start:], first + full[0], scores)
            query_kl, query_rest_kl, _, _ = _row_kl(query[start:], first + query[0], scores)
            key_kl, key_rest_kl, _, _ = _row_kl(key[start:], first + key[0], scores)
            kl[0, head] += full_kl
            kl[1, head] += query_kl
            kl[2, head] += key_kl
            if position >= FIRST_NO_BOS_ROW:
                kl_no_bos[0] += full_rest_kl
                kl_no_bos[1] += query_rest_kl
                kl_no_bos[2] += key_rest_kl
            error = _largest_error(weights, np.exp(largest), full[start:], np.exp(largest_hat - log_sum))
            if apart:
                error = max(error, abs(np.exp(first) - np.exp(first + full[0] - log_sum)))
            top1_and_error[1] += error


@inlined
def _row_kl(delta, first_hat, scores):
    """KL(p ‖ p̂) of a row and of its columns without the first, renormalised; the two are equal if none is apart.

    `delta` are score differences without the first column's, whose log p + Δs is `first_hat`. They become
    p̂ · exp(log sum − largest): these two are returned as well.
    """
    log_truth, weights, largest, total, apart, first = scores
    mean = delta.dtype.type(0.0)
    for j in range(delta.size):
        mean += weights[j] * delta[j]
    rest_mean = np.float64(mean) / total
    for j in range(delta.size):
        delta[j] += log_truth[j]
    largest_hat = _maximum(delta)
    for j in range(delta.size):
        delta[j] -= largest_hat
    log_rest = np.float64(largest) + np.log(np.float64(total))
    log_rest_hat = np.float64(largest_hat) + np.log(np.float64(_exponentials(delta)))
    rest_kl = log_rest_hat - log_rest - rest_mean
    if not apart:
        return rest_kl, rest_kl, largest_hat, log_rest_hat
    log_all, log_all_hat = _log_add(log_rest, first), _log_add(log_rest_hat, first_hat)
    mean = np.exp(log_rest - log_all) * rest_mean
    if first > -np.inf:
        # otherwise a window hides it
        mean += np.exp(first - log_all) * (first_hat - first)
    return log_all_hat - log_all - mean, rest_kl, largest_hat, log_all_hat


@inlined
def _maximum(values):
    largest = values.dtype.type(-np.inf)
    for j in range(values.size):
        largest = larger(largest, values[j])
    return largest


@inlined
def _exponentials(values):
    """Turns values ≤ 0 into their exponentials and returns the sum."""
    total = values.dtype.type(0.0)
    for j in range(values.size):
        values[j] = exponential(values[j])
        total += values[j]
    return total


@inlined
def _log_add(a, b):
    """log(exp(a) + exp(b))"""
    return max(a, b) + np.log1p(np.exp(min(a, b) - max(a, b)))


@inlined
def _same_largest(delta, log_truth):
    """Whether p̂ is largest where p is (at the first such column, if p has several)."""
    largest = _maximum(log_truth)
    largest_hat = delta.dtype.type(-np.inf)
    for j in range(delta.size):
        largest_hat = larger(largest_hat, log_truth[j] + delta[j])
    best = 0
    while log_truth[best] != largest:
        best += 1
    return np.int64(log_truth[best] + delta[best] == largest_hat)


@inlined
def _largest_error(weights, scale, weights_hat, scale_hat):
    """max |scale · weights − scale_hat · weights_hat|"""
    scale, scale_hat = weights.dtype.type(scale), weights.dtype.type(scale_hat)
    error = weights.dtype.type(0.0)
    for j in range(weights.size):
        error = larger(error, abs(scale * weights[j] - scale_hat * weights_hat[j]))
    return error
