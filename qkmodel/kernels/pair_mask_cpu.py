"""Compiled loops over pairs of active features, one head of one sequence at a time.

Active features stand in slots. The query side's are in the order of positions: position i has the slots
`starts[i]:starts[i + 1]`, slot a the feature `features[a]`. The key side's are in the order of features: feature n has
the slots `starts[n]:starts[n + 1]`, slot b the position `positions[b]`, ascending within a feature.
`u` [query slots, d_head] and `v` [key slots, d_head] are decoder rows, rotated to their position, times activation and
scale: the contribution of a pair of slots to its score is `u[a] · v[b]`. Position i sees the keys from
`first_visible[i]` to i.

Pairs are held by query feature: those of feature n are the entries `starts[n]:starts[n + 1]` of `key_features` and of
the mask.
"""

import numpy as np

from qkmodel.kernels.machine_code import inlined, kernel


@kernel
def add_saliency(query, key, u, v, p, slope, first_visible, first_feature, saliency):
    """Adds ½·Var_p(slope · contribution) of every pair, over all rows, to `saliency` [query features of a block, key
    features].

    The block begins with the query feature `first_feature` and has all that are active. `slope` [context, context] is
    that of the soft-cap; empty: 1.
    """
    (starts, features), (key_starts, positions) = query, key
    half, zero = u.dtype.type(0.5), u.dtype.type(0)
    for i in range(starts.size - 1):
        for a in range(starts[i], starts[i + 1]):
            row = features[a] - first_feature
            for feature in range(key_starts.size - 1):
                mean, square = zero, zero
                for b in range(key_starts[feature], key_starts[feature + 1]):
                    j = positions[b]
                    if j > i:
                        break
                    if j >= first_visible[i]:
                        contribution = _dot(u[a], v[b])
                        if slope.size:
                            contribution *= slope[i, j]
                        weighted = p[i, j] * contribution
                        mean += weighted
                        square += weighted * contribution
                if square > mean * mean:
                    saliency[row, feature] += half * (square - mean * mean)


@kernel
def add_pairs(query, key, u, v, first_visible, pairs, scores):
    """Adds the masked contributions of the pairs to `scores` [context, context]."""
    (starts, features), (key_starts, positions) = query, key
    pair_starts, pair_features, mask = pairs
    for i in range(starts.size - 1):
        for a in range(starts[i], starts[i + 1]):
            for pair in range(pair_starts[features[a]], pair_starts[features[a] + 1]):
                if mask[pair] == 0:
                    continue
                feature = pair_features[pair]
                for b in range(key_starts[feature], key_starts[feature + 1]):
                    j = positions[b]
                    if j > i:
                        break
                    if j >= first_visible[i]:
                        scores[i, j] += mask[pair] * _dot(u[a], v[b])


@kernel
def add_shares(query, key, u, v, first_visible, pairs, weights, sums):
    """Adds to each pair's `sums`: its contributions, how many there were, and Σ weight · contribution.

    `weights` [context, context]; `sums` are three arrays over the pairs.
    """
    (starts, features), (key_starts, positions) = query, key
    pair_starts, pair_features = pairs
    totals, counts, weighted = sums
    for i in range(starts.size - 1):
        for a in range(starts[i], starts[i + 1]):
            for pair in range(pair_starts[features[a]], pair_starts[features[a] + 1]):
                feature = pair_features[pair]
                for b in range(key_starts[feature], key_starts[feature + 1]):
                    j = positions[b]
                    if j > i:
                        break
                    if j >= first_visible[i]:
                        contribution = _dot(u[a], v[b])
                        totals[pair] += contribution
                        counts[pair] += 1
                        weighted[pair] += weights[i, j] * contribution


@kernel
def add_gradients(query, key, u, v, first_visible, pairs, terms, soft_cap, gradients):
    """KL(p ‖ p̂) summed over the rows, and its gradients, in one pass over the pairs.

    `terms` are the scores without the pairs and log p, both [context, context]. `gradients` are those with respect to
    the mask (added to), to the uncapped scores [context, context] and to `u` and `v` (added to; empty: not wanted).
    """
    (starts, features), (key_starts, positions) = query, key
    pair_starts, pair_features, mask = pairs
    bias_scores, log_p = terms
    mask_gradient, score_gradient, u_gradient, v_gradient = gradients
    room = _most_hits(query, key_starts, pair_starts, pair_features)
    hit_pair, hit_query, hit_key = np.empty(room, np.int64), np.empty(room, np.int32), np.empty(room, np.int32)
    hit_value = np.empty(room, u.dtype)
    total = 0.0
    for i in range(starts.size - 1):
        first = first_visible[i]
        scores = score_gradient[i]
        scores[first : i + 1] = bias_scores[i, first : i + 1]
        hits = 0
        for a in range(starts[i], starts[i + 1]):
            for pair in range(pair_starts[features[a]], pair_starts[features[a] + 1]):
                feature = pair_features[pair]
                for b in range(key_starts[feature], key_starts[feature + 1]):
                    j = positions[b]
                    if j > i:
                        break
                    if j < first:
                        continue
                    contribution = _dot(u[a], v[b])
                    hit_pair[hits] = pair
                    hit_query[hits] = a
                    hit_key[hits] = b
                    hit_value[hits] = contribution
                    hits += 1
                    scores[j] += mask[pair] * contribution
        total += _row_kl_and_gradient(scores[first : i + 1], log_p[i, first : i + 1], soft_cap)
        for hit in range(hits):
            mask_gradient[hit_pair[hit]] += scores[positions[hit_key[hit]]] * hit_value[hit]
        if u_gradient.size:
            for hit in range(hits):
                a, b = hit_query[hit], hit_key[hit]
                weight = scores[positions[b]] * mask[hit_pair[hit]]
                if weight != 0:
                    _add_scaled(u_gradient[a], weight, v[b])
                    _add_scaled(v_gradient[b], weight, u[a])
    return total


@inlined
def _row_kl_and_gradient(scores, log_p, soft_cap):
    """KL(p ‖ p̂) of a row whose uncapped scores become their gradient, p̂ − p through the soft-cap."""
    slope = np.ones(scores.size, scores.dtype)
    if soft_cap > 0:
        for j in range(scores.size):
            capped = np.tanh(scores[j] / soft_cap)
            scores[j] = soft_cap * capped
            slope[j] = 1 - capped * capped
    largest = scores.max()
    total = 0.0
    for j in range(scores.size):
        total += np.exp(np.float64(scores[j] - largest))
    log_total = np.log(total) + largest
    kl = 0.0
    for j in range(scores.size):
        log_p_hat = scores[j] - log_total
        p = np.exp(np.float64(log_p[j]))
        if p > 0:
            kl += p * (log_p[j] - log_p_hat)
        scores[j] = (np.exp(log_p_hat) - p) * slope[j]
    return kl


@inlined
def _dot(x, y):
    total = x.dtype.type(0)
    for index in range(x.size):
        total += x[index] * y[index]
    return total


@inlined
def _add_scaled(array, weight, other):
    for index in range(array.size):
        array[index] += weight * other[index]


@inlined
def _most_hits(query, key_starts, pair_starts, pair_features):
    """No row has more pairs of slots than this."""
    (starts, features), most = query, 0
    for i in range(starts.size - 1):
        hits = 0
        for a in range(starts[i], starts[i + 1]):
            for pair in range(pair_starts[features[a]], pair_starts[features[a] + 1]):
                hits += key_starts[pair_features[pair] + 1] - key_starts[pair_features[pair]]
        most = max(most, hits)
    return most
