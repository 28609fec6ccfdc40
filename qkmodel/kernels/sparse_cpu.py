"""Sparse transcoders on a CPU: once a few features per token are chosen, nothing else is touched again.

Pre-activations come as a dense product, in float32 or bfloat16, and only choose the features; the activations of
the chosen ones are computed anew in float32. Positive floats are ordered as their bits are, so choosing compares
integers: `bits` is a float tensor seen as int16 (bfloat16) or int32 (float32).

A `code` is (starts, features, values): token t activates `features[starts[t]:starts[t + 1]]`, in no order.
"""

import numpy as np

from qkmodel.kernels.machine_code import inlined, kernel


@kernel
def choose_largest(bits, k, starts, features):
    """The k largest positive pre-activations of each token, the first of equal ones.

    Fills `starts` [tokens + 1] and `features` [tokens · k]; a token with fewer positive ones keeps those.
    """
    starts[0] = 0
    for token in range(bits.shape[0]):
        row = bits[token : token + 1]
        threshold = _kth_largest(row, k, 0)
        spare = k - _count_from(row, threshold + bits.dtype.type(1), 0)
        starts[token + 1], _ = _keep(bits[token], threshold, spare, starts[token], features)


@kernel
def choose_largest_of_batch(bits, context, budget, starts, features):
    """The `budget` largest positive pre-activations of all tokens but those at position 0, the first of equal ones.

    Position 0 keeps what is as large as the smallest of them, which is returned, as bits: 1 if fewer are positive.
    `features` has room for the budget and for every feature of every position 0.
    """
    starts[0] = 0
    threshold = _kth_largest(bits, budget, context)
    spare = budget - _count_from(bits, threshold + bits.dtype.type(1), context)
    for token in range(bits.shape[0]):
        if token % context == 0:
            starts[token + 1], _ = _keep(bits[token], threshold, bits.shape[1], starts[token], features)
        else:
            starts[token + 1], spare = _keep(bits[token], threshold, spare, starts[token], features)
    return threshold


@kernel
def count_positive(bits):
    """How many pre-activations are positive."""
    return _count_from(bits, bits.dtype.type(1), 0)


@kernel
def choose_positive(bits, starts, features):
    """All positive pre-activations of each token; fills `starts` [tokens + 1] and `features` [their count]."""
    starts[0] = 0
    for token in range(bits.shape[0]):
        starts[token + 1], _ = _keep(bits[token], bits.dtype.type(1), bits.shape[1], starts[token], features)


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
def _kth_largest(bits, k, context):
    """The k-th largest element, or 1 if fewer are positive: by halving the interval that it lies in."""
    low, high = np.int64(1), np.int64(np.iinfo(bits.dtype).max)
    while low < high:
        middle = low + (high - low + 1) // 2
        if _count_from(bits, bits.dtype.type(middle), context) >= k:
            low = middle
        else:
            high = middle - 1
    return bits.dtype.type(low)


@inlined
def _count_from(bits, threshold, context):
    """Elements from `threshold` on, without those of every `context`-th row (context 0: of all rows)."""
    total = 0
    for token in range(bits.shape[0]):
        if context > 0 and token % context == 0:
            continue
        count = np.int32(0)
        for j in range(bits.shape[1]):
            count += np.int32(bits[token, j] >= threshold)
        total += count
    return total


@kernel
def encode_chosen(x, w_enc, b_enc, starts, features, values):
    """Activations max(w_i·x + b_i, 0) of the chosen features."""
    for token in range(x.shape[0]):
        for place in range(starts[token], starts[token + 1]):
            i = features[place]
            pre = b_enc[i]
            for d in range(x.shape[1]):
                pre += x[token, d] * w_enc[i, d]
            values[place] = max(pre, b_enc.dtype.type(0.0))


@kernel
def keep_largest(k, starts, values):
    """Sets all but the k largest values of each token to 0, the last of equal ones first."""
    for token in range(len(starts) - 1):
        first, last = starts[token], starts[token + 1]
        if last - first <= k:
            continue
        threshold = np.sort(values[first:last])[last - first - k]
        spare = k
        for place in range(first, last):
            spare -= values[place] > threshold
        for place in range(first, last):
            if values[place] == threshold and spare > 0:
                spare -= 1
            elif values[place] <= threshold:
                values[place] = 0.0


@kernel
def decode_chosen(starts, features, values, w_dec, b_out, y):
    """y = Σ f_i w_dec_i + b_out."""
    for token in range(y.shape[0]):
        for o in range(y.shape[1]):
            y[token, o] = b_out[o]
        for place in range(starts[token], starts[token + 1]):
            i, f = features[place], values[place]
            for o in range(y.shape[1]):
                y[token, o] += f * w_dec[i, o]


@kernel
def add_gradients(x, starts, features, values, w_dec, dy, d_values, g_w_enc, g_b_enc, g_w_dec, g_b_out):
    """Adds the gradients of encoder and decoder, given those of the decoder's output and of the values themselves.

    `d_values` may be empty: the values then have none of their own.
    """
    for token in range(x.shape[0]):
        for o in range(dy.shape[1]):
            g_b_out[o] += dy[token, o]
        for place in range(starts[token], starts[token + 1]):
            i, f = features[place], values[place]
            if f == 0:
                continue
            df = d_values[place] if d_values.size > 0 else g_b_enc.dtype.type(0.0)
            for o in range(dy.shape[1]):
                df += dy[token, o] * w_dec[i, o]
            for o in range(dy.shape[1]):
                g_w_dec[i, o] += f * dy[token, o]
            g_b_enc[i] += df
            for d in range(x.shape[1]):
                g_w_enc[i, d] += df * x[token, d]


@kernel
def count_active(context, starts, values):
    """How many values are positive, position 0 left out."""
    active = 0
    for token in range(len(starts) - 1):
        if token % context == 0:
            continue
        for place in range(starts[token], starts[token + 1]):
            active += values[place] > 0
    return active


@kernel
def count_fired(context, starts, features, values, counts):
    """Adds to `counts` how often each feature is active, position 0 left out."""
    for token in range(len(starts) - 1):
        if token % context == 0:
            continue
        for place in range(starts[token], starts[token + 1]):
            if values[place] > 0:
                counts[features[place]] += 1
