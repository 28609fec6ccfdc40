"""Which features of a token are active: chosen on a CPU from pre-activations, most of which are not looked at twice.

Positive floats are ordered as their bits are, so choosing compares integers: `bits` is a float tensor seen as int16
(bfloat16) or int32 (float32). Chosen are `features[starts[t]:starts[t + 1]]` of token t, in ascending order.
"""

import numpy as np

from qkmodel.kernels.machine_code import inlined, kernel

# A row's elements are taken in so many groups, for each one that is to be found: their maxima bound it closely.
GROUPS_FOR_EACH = 4
# Loops over arrays of such a length have no remainder, which would take longer than they do.
WHOLE = 64


@kernel
def choose_largest(bits, k, starts, features):
    """The k largest positive pre-activations of each token, the first of equal ones.

    Fills `starts` [tokens + 1] and `features` [tokens · k]; a token with fewer positive ones keeps those.
    """
    starts[0] = 0
    space = _space(bits.shape[1], k, bits.dtype)
    for token in range(bits.shape[0]):
        starts[token + 1] = _choose_in_row(bits[token], k, space, starts[token], features)


@kernel
def choose_largest_of_products(products, x_scales, w_scales, b_enc, k, starts, features):
    """The same, of pre-activations that are made here: integer products times the scales of both factors, and bias.

    They are cut down to bfloat16, which is finer than the products, and half as much to look at.
    """
    starts[0] = 0
    pre = np.empty(products.shape[1], np.float32)
    whole_bits, bits = pre.view(np.int32), np.empty(products.shape[1], np.int16)
    space = _space(len(bits), k, bits.dtype)
    for token in range(products.shape[0]):
        scale = x_scales[token]
        for j in range(pre.size):
            pre[j] = np.float32(products[token, j]) * (scale * w_scales[j]) + b_enc[j]
        for j in range(pre.size):
            bits[j] = np.int16(whole_bits[j] >> np.int32(16))
        starts[token + 1] = _choose_in_row(bits, k, space, starts[token], features)


@inlined
def _space(width, k, dtype):
    """Memory for choosing k of `width` elements: maxima of groups; which are candidates, eight to a word; these."""
    groups = min(width, -(-GROUPS_FOR_EACH * k // WHOLE) * WHOLE)
    candidates, numbers = np.empty(width + WHOLE, dtype), np.empty(width + WHOLE, np.int32)
    return np.empty(groups, dtype), np.zeros(-(-width // 8), np.int64), candidates, numbers


@inlined
def _choose_in_row(row, k, space, place, features):
    """Writes the k largest positive elements' numbers from `place` on, and returns the place after the last."""
    maxima, eights, candidates, numbers = space
    for j in range(maxima.size):
        maxima[j] = row[j]
    for start in range(maxima.size, row.size, maxima.size):
        part = row[start : start + maxima.size]
        for j in range(part.size):
            maxima[j] = max(maxima[j], part[j])
    # what k of some elements reach, k of all reach
    bound = _bound_of_largest(maxima, k)
    count, is_candidate = 0, eights.view(np.int8)
    for j in range(row.size):
        is_candidate[j] = np.int8(row[j] >= bound)
    for eight in range(eights.size):
        if eights[eight] != 0:
            for j in range(8 * eight, 8 * eight + 8):
                # written in any case, and left there only if it is one: a branch would be mispredicted
                numbers[count] = j
                count += is_candidate[j]
    for n in range(count):
        candidates[n] = row[numbers[n]]
    whole = -(-count // WHOLE) * WHOLE
    for n in range(count, whole):
        candidates[n] = 0
    threshold = _bound_of_largest(candidates[:whole], k)
    spare = k - _count_from(candidates[:whole], threshold + row.dtype.type(1))
    for n in range(count):
        if candidates[n] >= threshold:
            if candidates[n] == threshold:
                if spare <= 0:
                    continue
                spare -= 1
            features[place] = numbers[n]
            place += 1
    return place


@kernel
def choose_largest_of_batch(bits, context, budget, starts, features):
    """The `budget` largest positive pre-activations of all tokens but those at position 0, the first of equal ones.

    Position 0 keeps what is as large as the smallest of them, which is returned, as bits: 1 if fewer are positive.
    `features` has room for the budget and for every feature of every position 0.
    """
    starts[0] = 0
    threshold = _smallest_of_batch(bits, context, budget)
    spare = budget - _count_in_batch(bits, context, threshold + bits.dtype.type(1))
    for token in range(bits.shape[0]):
        if token % context == 0:
            starts[token + 1], _ = _keep(bits[token], threshold, bits.shape[1], starts[token], features)
        else:
            starts[token + 1], spare = _keep(bits[token], threshold, spare, starts[token], features)
    return threshold


@kernel
def count_positive(bits):
    """How many pre-activations are positive."""
    total = 0
    for token in range(bits.shape[0]):
        total += _count_from(bits[token], bits.dtype.type(1))
    return total


@kernel
def choose_positive(bits, starts, features):
    """All positive pre-activations of each token; fills `starts` [tokens + 1] and `features` [their count]."""
    starts[0] = 0
    for token in range(bits.shape[0]):
        starts[token + 1], _ = _keep(bits[token], bits.dtype.type(1), bits.shape[1], starts[token], features)


@kernel
def keep_largest(k, starts, features, values):
    """Keeps the k largest positive values of each token, the first of equal ones, and moves them together.

    Returns how many are left.
    """
    bits = values.view(np.int32)
    first, place = starts[0], starts[0]
    for token in range(len(starts) - 1):
        last = starts[token + 1]
        threshold = _bound_of_largest(bits[first:last], k)
        spare = k - _count_from(bits[first:last], threshold + np.int32(1))
        for old in range(first, last):
            if bits[old] >= threshold:
                if bits[old] == threshold:
                    if spare <= 0:
                        continue
                    spare -= 1
                features[place], values[place] = features[old], values[old]
                place += 1
        first, starts[token + 1] = last, place
    return place


@inlined
def _keep(bits, threshold, spare, place, features):
    """Writes the features above `threshold`, and at most `spare` equal to it, from `place` on.

    Returns the place after the last of them and how many equal ones may still follow.
    """
    for j in range(bits.size):
        if bits[j] >= threshold:
            if bits[j] == threshold:
                if spare <= 0:
                    continue
                spare -= 1
            features[place] = j
            place += 1
    return place, spare


@inlined
def _bound_of_largest(row, k):
    """A number that exactly the k largest elements reach, by halving the interval that it lies in.

    With equal ones there may be none: then the k-th largest element; and 1 if fewer are positive.
    """
    low, high = np.int64(1), np.int64(np.iinfo(row.dtype).max)
    while low < high:
        middle = low + (high - low + 1) // 2
        count = _count_from(row, row.dtype.type(middle))
        if count == k:
            return row.dtype.type(middle)
        if count > k:
            low = middle
        else:
            high = middle - 1
    return row.dtype.type(low)


@inlined
def _smallest_of_batch(bits, context, budget):
    """The `budget`-th largest element of all rows but those at position 0, or 1 if fewer are positive."""
    low, high = np.int64(1), np.int64(np.iinfo(bits.dtype).max)
    while low < high:
        middle = low + (high - low + 1) // 2
        if _count_in_batch(bits, context, bits.dtype.type(middle)) >= budget:
            low = middle
        else:
            high = middle - 1
    return bits.dtype.type(low)


@inlined
def _count_in_batch(bits, context, threshold):
    """Elements from `threshold` on, without those of position 0."""
    total = 0
    for token in range(bits.shape[0]):
        if token % context != 0:
            total += _count_from(bits[token], threshold)
    return total


@inlined
def _count_from(row, threshold):
    """Elements from `threshold` on."""
    count = np.int32(0)
    for j in range(row.size):
        count += np.int32(row[j] >= threshold)
    return count
