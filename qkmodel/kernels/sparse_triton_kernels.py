"""The Triton kernels of `sparse_triton`, which says what they compute.

Every program has one token. Widths are padded with zeros to powers of two (`DEPTH_IN`, `DEPTH_OUT`, `ROW`), and a
token's features are taken `STEP` at a time.
"""

import triton
import triton.language as tl


@triton.jit
def choose_largest(
    bits, features, counts, cursors, width,
    K: tl.constexpr, NEAR: tl.constexpr, GROUP: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Features of the K largest positive pre-activations, in any order, the first of equal ones; how many they are.

    `cursors` are zeros. The K-th largest is found by halving the interval it lies in: first that of the maxima of small
    groups, most likely among the `NEAR` numbers under the largest, which most often is that of all features.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, ROW)
    row = tl.load(bits + token * width + columns, mask=columns < width, other=0).to(tl.int32)
    maxima = tl.max(tl.reshape(row, [ROW // GROUP, GROUP]), 1)
    largest = tl.max(maxima, 0)
    near = tl.maximum(largest - NEAR, 1)
    is_near = tl.sum((maxima >= near).to(tl.int32), 0) >= K
    low = tl.where(is_near, near, 1)
    high = tl.where(is_near, largest, near - 1)
    while low < high:
        middle = low + (high - low + 1) // 2
        enough = tl.sum((maxima >= middle).to(tl.int32), 0) >= K
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    from_low = tl.sum((row >= low).to(tl.int32), 0)
    high = largest
    while (low < high) & (from_low > K):
        middle = low + (high - low + 1) // 2
        found = tl.sum((row >= middle).to(tl.int32), 0)
        low = tl.where(found >= K, middle, low)
        from_low = tl.where(found >= K, found, from_low)
        high = tl.where(found >= K, high, middle - 1)
    # where no more than K are that large, none is left over to be sought one by one
    low = tl.where(from_low <= K, low - 1, low)
    above, equal = row > low, row == low
    larger = tl.sum(above.to(tl.int32), 0)
    # a scan would give places in order, and take as long as all of the halving
    places = tl.atomic_add(cursors + token + tl.zeros([ROW], tl.int32), 1, mask=above, sem="relaxed")
    tl.store(features + token * K + places, columns, mask=above)
    count = tl.minimum(from_low, K)
    last = tl.full([], -1, tl.int32)
    for place in range(larger, count):
        last = tl.min(tl.where(equal & (columns > last), columns, ROW), 0)
        tl.store(features + token * K + place, last)
    tl.store(counts + token, count)


@triton.jit
def encode_and_decode(
    x, w_enc, b_enc, w_dec, b_out, features, counts, values, y, active, d_in, d_out,
    K: tl.constexpr, PLACES: tl.constexpr, STEP: tl.constexpr, DEPTH_IN: tl.constexpr, DEPTH_OUT: tl.constexpr,
):  # fmt: skip
    """values = max(w_i·x + b_i, 0) of the chosen features, 0 past their count;  y = Σ values_i w_dec_i + b_out.

    Puts `features` in order first, so that sums do not depend on the order in which they were found, and 0 past their
    count. `active` counts the values over 0.
    """
    token = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + token)
    everywhere = tl.arange(0, PLACES)
    found = tl.load(features + token * K + everywhere, mask=everywhere < count, other=2147483647)
    tl.store(features + token * K + everywhere, tl.where(everywhere < count, tl.sort(found), 0), mask=everywhere < K)
    # what follows reads what other threads may have written; the sort itself is over before anything is stored
    tl.debug_barrier()
    into, out = tl.arange(0, DEPTH_IN), tl.arange(0, DEPTH_OUT)
    inputs = tl.load(x + token * d_in + into, mask=into < d_in, other=0.0)
    total = tl.load(b_out + out, mask=out < d_out, other=0.0)
    positive = tl.full([], 0, tl.int32)
    for start in range(0, K, STEP):
        places = start + tl.arange(0, STEP)
        chosen = places < count
        at = tl.load(features + token * K + places, mask=chosen, other=0).to(tl.int64)
        rows = tl.load(
            w_enc + at[:, None] * d_in + into[None, :], mask=chosen[:, None] & (into < d_in)[None, :], other=0.0
        )
        pre = tl.sum(rows * inputs[None, :], 1) + tl.load(b_enc + at, mask=chosen, other=0.0)
        value = tl.maximum(pre, 0.0)
        tl.store(values + token * K + places, value, mask=places < K)
        positive += tl.sum((value > 0.0).to(tl.int32), 0)
        rows = tl.load(
            w_dec + at[:, None] * d_out + out[None, :], mask=chosen[:, None] & (out < d_out)[None, :], other=0.0
        )
        total += tl.sum(rows * value[:, None], 0)
    tl.store(y + token * d_out + out, total, mask=out < d_out)
    tl.store(active + token, positive)


@triton.jit
def spread_code(
    dy, w_dec, features, counts, values, all_values, all_gradients, rounded_dy, width, d_out,
    K: tl.constexpr, STEP: tl.constexpr, DEPTH_OUT: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Values of the chosen features, and their gradients w_dec_i·dy where they are active, among zeros for others."""
    token = tl.program_id(0).to(tl.int64)
    columns, out = tl.arange(0, ROW), tl.arange(0, DEPTH_OUT)
    element = all_values.dtype.element_ty
    nothing = tl.zeros([ROW], element)
    tl.store(all_values + token * width + columns, nothing, mask=columns < width)
    tl.store(all_gradients + token * width + columns, nothing, mask=columns < width)
    gradient = tl.load(dy + token * d_out + out, mask=out < d_out, other=0.0)
    tl.store(rounded_dy + token * d_out + out, gradient.to(element), mask=out < d_out)
    count = tl.load(counts + token)
    # other threads may have written the zeros under what follows
    tl.debug_barrier()
    for start in range(0, K, STEP):
        places = start + tl.arange(0, STEP)
        chosen = places < count
        at = tl.load(features + token * K + places, mask=chosen, other=0).to(tl.int64)
        value = tl.load(values + token * K + places, mask=chosen, other=0.0)
        here = chosen[:, None] & (out < d_out)[None, :]
        rows = tl.load(w_dec + at[:, None] * d_out + out[None, :], mask=here, other=0.0)
        slope = tl.where(value > 0.0, tl.sum(rows * gradient[None, :], 1), 0.0)
        tl.store(all_values + token * width + at, value.to(element), mask=chosen)
        tl.store(all_gradients + token * width + at, slope.to(element), mask=chosen)
