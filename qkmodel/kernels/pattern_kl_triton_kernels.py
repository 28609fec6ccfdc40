"""The Triton kernels of `pattern_kl_triton`, which says what they compute and in what order.

Every program owns `OWN` positions of one head of one sequence and walks over the other side in steps of `STEP`.
`left` is the side a program owns, `right` the side it walks over, so that query and key gradients share their code:
a tile of scores is [left, right], and its transpose is never formed. `query_changes` and `key_changes` are Δq and
Δk. Head sizes are padded with zeros to `DEPTH`, a power of two; a `SOFT_CAP` of 0 is none.
"""

import triton
import triton.language as tl

from qkmodel.kernels import pattern_kl_terms

FULL_WEIGHT = tl.constexpr(pattern_kl_terms.FULL_WEIGHT)


@triton.jit
def turn(
    source, cos, sin, base, out, rows, context, scale,
    HEADS: tl.constexpr, D_HEAD: tl.constexpr, DEPTH: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    BACK: tl.constexpr, HAS_BASE: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """out = scale · (rotary embedding of the source) − base; `BACK` turns by the negative angle: its transpose.

    A row is one head at one position. `cos` and `sin` are [context, ROTARY / 2].
    """
    own = (tl.program_id(0) * OWN + tl.arange(0, OWN)).to(tl.int64)
    depth = tl.arange(0, DEPTH)[None, :]
    at = own[:, None] * D_HEAD + depth
    mask = (own < rows)[:, None] & (depth < D_HEAD)
    values = tl.load(source + at, mask=mask, other=0.0)
    if ROTARY > 0:
        is_first = depth % 2 == 0 if INTERLEAVED else depth < ROTARY // 2
        pair = depth // 2 if INTERLEAVED else depth % (ROTARY // 2)
        apart = 1 if INTERLEAVED else ROTARY // 2
        turned = mask & (depth < ROTARY)
        others = tl.load(source + at + tl.where(is_first, apart, -apart), mask=turned, other=0.0)
        angle = ((own // HEADS) % context)[:, None] * (ROTARY // 2) + pair
        others *= tl.load(sin + angle, mask=turned, other=0.0)
        values *= tl.load(cos + angle, mask=turned, other=1.0)
        values += tl.where(is_first ^ BACK, -others, others)
    values *= scale
    if HAS_BASE:
        values -= tl.load(base + at, mask=mask, other=0.0)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def true_log_sums(
    queries, keys, log_sums, context, window,
    N_HEADS: tl.constexpr, N_KV_HEADS: tl.constexpr, D_HEAD: tl.constexpr, DEPTH: tl.constexpr,
    SOFT_CAP: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """log Σ exp(s) of each row of true scores."""
    sequence, head = tl.program_id(0) // N_HEADS, tl.program_id(0) % N_HEADS
    first = _longest_rows_first(OWN)
    rows = first + tl.arange(0, OWN)
    queries = _of_head(queries, sequence, head, context, N_HEADS, D_HEAD)
    q = _load(queries, rows, context, N_HEADS, D_HEAD, DEPTH)
    keys = _of_head(keys, sequence, head // (N_HEADS // N_KV_HEADS), context, N_KV_HEADS, D_HEAD)
    largest, total, _ = _no_keys_yet(OWN)
    for start in range(tl.maximum(first - window + 1, 0), tl.minimum(first + OWN, context), STEP):
        columns = start + tl.arange(0, STEP)
        k = _load(keys, columns, context, N_KV_HEADS, D_HEAD, DEPTH)
        scores = _capped(tl.dot(q, tl.trans(k), input_precision="ieee"), SOFT_CAP)
        visible = _visible(rows[:, None], columns[None, :], window)
        largest, total = _add_block(tl.where(visible, scores, float("-inf")), largest, total)
    tl.store(log_sums + tl.program_id(0) * context + rows, largest + tl.log(total), mask=rows < context)


@triton.jit
def row_normalisers(
    queries, query_changes, keys, key_changes, log_sums, normalisers, sums, context, window,
    N_HEADS: tl.constexpr, N_KV_HEADS: tl.constexpr, D_HEAD: tl.constexpr, DEPTH: tl.constexpr,
    SOFT_CAP: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Per term (full, queries only, keys only): log Σ p·exp(Δs) of each row, and the sum of its own rows' KLs."""
    sequence, head = tl.program_id(0) // N_HEADS, tl.program_id(0) % N_HEADS
    kv_head = head // (N_HEADS // N_KV_HEADS)
    first = _longest_rows_first(OWN)
    rows = first + tl.arange(0, OWN)
    queries = _of_head(queries, sequence, head, context, N_HEADS, D_HEAD)
    query_changes = _of_head(query_changes, sequence, head, context, N_HEADS, D_HEAD)
    q = _load(queries, rows, context, N_HEADS, D_HEAD, DEPTH)
    q_change = _load(query_changes, rows, context, N_HEADS, D_HEAD, DEPTH)
    keys = _of_head(keys, sequence, kv_head, context, N_KV_HEADS, D_HEAD)
    key_changes = _of_head(key_changes, sequence, kv_head, context, N_KV_HEADS, D_HEAD)
    log_sum = tl.load(log_sums + tl.program_id(0) * context + rows, mask=rows < context, other=0.0)
    full_largest, full_total, full_mean = _no_keys_yet(OWN)
    query_largest, query_total, query_mean = _no_keys_yet(OWN)
    key_largest, key_total, key_mean = _no_keys_yet(OWN)
    for start in range(tl.maximum(first - window + 1, 0), tl.minimum(first + OWN, context), STEP):
        columns = start + tl.arange(0, STEP)
        k = _load(keys, columns, context, N_KV_HEADS, D_HEAD, DEPTH)
        k_change = _load(key_changes, columns, context, N_KV_HEADS, D_HEAD, DEPTH)
        raw, by_query, by_key, by_both = _products(q, q_change, k, k_change)
        visible = _visible(rows[:, None], columns[None, :], window)
        log_p = tl.where(visible, _capped(raw, SOFT_CAP) - log_sum[:, None], float("-inf"))
        p = tl.exp(log_p)
        full = _change(raw, by_both, SOFT_CAP)
        query = _change(raw, by_query, SOFT_CAP)
        key = _change(raw, by_key, SOFT_CAP)
        full_mean += tl.sum(p * full, 1)
        query_mean += tl.sum(p * query, 1)
        key_mean += tl.sum(p * key, 1)
        full_largest, full_total = _add_block(log_p + full, full_largest, full_total)
        query_largest, query_total = _add_block(log_p + query, query_largest, query_total)
        key_largest, key_total = _add_block(log_p + key, key_largest, key_total)
    _finish_rows(0, full_largest + tl.log(full_total), full_mean, normalisers, sums, rows, context)
    _finish_rows(1, query_largest + tl.log(query_total), query_mean, normalisers, sums, rows, context)
    _finish_rows(2, key_largest + tl.log(key_total), key_mean, normalisers, sums, rows, context)


@triton.jit
def query_gradient(
    queries, query_changes, keys, key_changes, log_sums, normalisers, gradient, factor, context, window,
    N_HEADS: tl.constexpr, N_KV_HEADS: tl.constexpr, D_HEAD: tl.constexpr, DEPTH: tl.constexpr,
    SOFT_CAP: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """`factor` times the gradient of Σ (3·KL full + KL queries only) with respect to the rotated, scaled queries."""
    sequence, head = tl.program_id(0) // N_HEADS, tl.program_id(0) % N_HEADS
    kv_head = head // (N_HEADS // N_KV_HEADS)
    first = _longest_rows_first(OWN)
    rows = first + tl.arange(0, OWN)
    queries = _of_head(queries, sequence, head, context, N_HEADS, D_HEAD)
    query_changes = _of_head(query_changes, sequence, head, context, N_HEADS, D_HEAD)
    q = _load(queries, rows, context, N_HEADS, D_HEAD, DEPTH)
    q_change = _load(query_changes, rows, context, N_HEADS, D_HEAD, DEPTH)
    keys = _of_head(keys, sequence, kv_head, context, N_KV_HEADS, D_HEAD)
    key_changes = _of_head(key_changes, sequence, kv_head, context, N_KV_HEADS, D_HEAD)
    at_row = tl.program_id(0) * context + rows
    term = tl.num_programs(0) * context
    log_sum = tl.load(log_sums + at_row, mask=rows < context, other=0.0)
    full_norm = tl.load(normalisers + at_row, mask=rows < context, other=0.0)
    query_norm = tl.load(normalisers + term + at_row, mask=rows < context, other=0.0)
    total = tl.zeros([OWN, DEPTH], tl.float32)
    for start in range(tl.maximum(first - window + 1, 0), tl.minimum(first + OWN, context), STEP):
        columns = start + tl.arange(0, STEP)
        k = _load(keys, columns, context, N_KV_HEADS, D_HEAD, DEPTH)
        k_change = _load(key_changes, columns, context, N_KV_HEADS, D_HEAD, DEPTH)
        raw, by_query, _, by_both = _products(q, q_change, k, k_change)
        visible = _visible(rows[:, None], columns[None, :], window)
        log_p = tl.where(visible, _capped(raw, SOFT_CAP) - log_sum[:, None], float("-inf"))
        full = FULL_WEIGHT * _score_gradient(raw, by_both, log_p, full_norm[:, None], SOFT_CAP)
        half = _score_gradient(raw, by_query, log_p, query_norm[:, None], SOFT_CAP)
        total = _add_products(total, full, half, k, k_change)
    gradient = _of_head(gradient, sequence, head, context, N_HEADS, D_HEAD)
    _store(gradient, total * factor, rows, context, N_HEADS, D_HEAD, DEPTH)


@triton.jit
def key_gradient(
    queries, query_changes, keys, key_changes, log_sums, normalisers, gradient, factor, context, window,
    N_HEADS: tl.constexpr, N_KV_HEADS: tl.constexpr, D_HEAD: tl.constexpr, DEPTH: tl.constexpr,
    SOFT_CAP: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """`factor` times the gradient of Σ (3·KL full + KL keys only) with respect to the rotated keys."""
    sequence, kv_head = tl.program_id(0) // N_KV_HEADS, tl.program_id(0) % N_KV_HEADS
    group = N_HEADS // N_KV_HEADS
    first = tl.program_id(1) * OWN
    columns = first + tl.arange(0, OWN)
    keys = _of_head(keys, sequence, kv_head, context, N_KV_HEADS, D_HEAD)
    key_changes = _of_head(key_changes, sequence, kv_head, context, N_KV_HEADS, D_HEAD)
    k = _load(keys, columns, context, N_KV_HEADS, D_HEAD, DEPTH)
    k_change = _load(key_changes, columns, context, N_KV_HEADS, D_HEAD, DEPTH)
    term = tl.num_programs(0) * group * context
    total = tl.zeros([OWN, DEPTH], tl.float32)
    for head in range(kv_head * group, (kv_head + 1) * group):
        head_queries = _of_head(queries, sequence, head, context, N_HEADS, D_HEAD)
        head_changes = _of_head(query_changes, sequence, head, context, N_HEADS, D_HEAD)
        head_row = (sequence * N_HEADS + head) * context
        for start in range(first, tl.minimum(first + OWN - 1 + window, context), STEP):
            rows = start + tl.arange(0, STEP)
            q = _load(head_queries, rows, context, N_HEADS, D_HEAD, DEPTH)
            q_change = _load(head_changes, rows, context, N_HEADS, D_HEAD, DEPTH)
            log_sum = tl.load(log_sums + head_row + rows, mask=rows < context, other=0.0)
            full_norm = tl.load(normalisers + head_row + rows, mask=rows < context, other=0.0)
            key_norm = tl.load(normalisers + 2 * term + head_row + rows, mask=rows < context, other=0.0)
            raw, by_key, _, by_both = _products(k, k_change, q, q_change)
            visible = _visible(rows[None, :], columns[:, None], window)
            log_p = tl.where(visible, _capped(raw, SOFT_CAP) - log_sum[None, :], float("-inf"))
            full = FULL_WEIGHT * _score_gradient(raw, by_both, log_p, full_norm[None, :], SOFT_CAP)
            half = _score_gradient(raw, by_key, log_p, key_norm[None, :], SOFT_CAP)
            total = _add_products(total, full, half, q, q_change)
    gradient = _of_head(gradient, sequence, kv_head, context, N_KV_HEADS, D_HEAD)
    _store(gradient, total * factor, columns, context, N_KV_HEADS, D_HEAD, DEPTH)


@triton.jit
def _longest_rows_first(OWN: tl.constexpr):
    # late rows see the most keys: started last, they would be what everything waits for
    return (tl.num_programs(1) - 1 - tl.program_id(1)) * OWN


@triton.jit
def _of_head(pointer, sequence, head, context, HEADS: tl.constexpr, D_HEAD: tl.constexpr):
    # batch · context · heads · d_head may pass 2³¹
    return pointer + (sequence.to(tl.int64) * context * HEADS + head) * D_HEAD


@triton.jit
def _load(pointer, positions, context, HEADS: tl.constexpr, D_HEAD: tl.constexpr, DEPTH: tl.constexpr):
    depth = tl.arange(0, DEPTH)
    mask = (positions < context)[:, None] & (depth < D_HEAD)[None, :]
    return tl.load(pointer + positions[:, None] * (HEADS * D_HEAD) + depth[None, :], mask=mask, other=0.0)


@triton.jit
def _store(pointer, values, positions, context, HEADS: tl.constexpr, D_HEAD: tl.constexpr, DEPTH: tl.constexpr):
    depth = tl.arange(0, DEPTH)
    mask = (positions < context)[:, None] & (depth < D_HEAD)[None, :]
    tl.store(pointer + positions[:, None] * (HEADS * D_HEAD) + depth[None, :], values, mask=mask)


@triton.jit
def _visible(rows, columns, window):
    # rows past the context need no mask: their zeros make p̂ = p, so no gradient, and their sums are left out
    return (columns <= rows) & (rows - columns < window)


@triton.jit
def _products(left, left_change, right, right_change):
    """True raw scores, and their change when the left side, the right side or both are reconstructed."""
    right, right_change = tl.trans(right), tl.trans(right_change)
    raw = tl.dot(left, right, input_precision="ieee")
    by_left = tl.dot(left_change, right, input_precision="ieee")
    by_right = tl.dot(left, right_change, input_precision="ieee")
    by_both = tl.dot(left_change, right_change, by_left + by_right, input_precision="ieee")
    return raw, by_left, by_right, by_both


@triton.jit
def _add_products(total, full, half, right, right_change):
    """total + full·(right + right_change) + half·right"""
    total = tl.dot((full + half).to(right.dtype), right, total, input_precision="ieee")
    return tl.dot(full.to(right.dtype), right_change, total, input_precision="ieee")


@triton.jit
def _capped(raw, SOFT_CAP: tl.constexpr):
    if SOFT_CAP == 0.0:
        return raw
    return SOFT_CAP * _tanh(raw / SOFT_CAP)


@triton.jit
def _change(raw, raw_change, SOFT_CAP: tl.constexpr):
    """Change of a score whose raw value changes from `raw` to `raw + raw_change`."""
    if SOFT_CAP == 0.0:
        return raw_change
    return _capped(raw + raw_change, SOFT_CAP) - _capped(raw, SOFT_CAP)


@triton.jit
def _score_gradient(raw, raw_change, log_p, normaliser, SOFT_CAP: tl.constexpr):
    """∂KL/∂(raw ŝ) = (p̂ − p), times the soft-cap's slope."""
    gradient = tl.exp(log_p + _change(raw, raw_change, SOFT_CAP) - normaliser) - tl.exp(log_p)
    if SOFT_CAP == 0.0:
        return gradient
    ratio = _tanh((raw + raw_change) / SOFT_CAP)
    return gradient * (1.0 - ratio * ratio)


@triton.jit
def _tanh(x):
    # exp overflows to infinity for large x, which gives the limit, 1
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _no_keys_yet(OWN: tl.constexpr):
    """Running maximum, sum of exponentials and mean of rows before their first block."""
    return tl.full([OWN], float("-inf"), tl.float32), tl.zeros([OWN], tl.float32), tl.zeros([OWN], tl.float32)


@triton.jit
def _add_block(values, largest, total):
    """Running maximum of each row and running Σ exp(value − maximum), one block further."""
    new_largest = tl.maximum(largest, tl.max(values, 1))
    # a row that has seen no key yet has maximum −inf, and −inf − (−inf) is no number
    shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    total = total * tl.exp(largest - shift) + tl.sum(tl.exp(values - shift[:, None]), 1)
    return new_largest, total


@triton.jit
def _finish_rows(term, normaliser, mean, normalisers, sums, rows, context):
    """Stores one term's normalisers, and the sum of KL = normaliser − Σ p·Δs over a program's rows."""
    inside = rows < context
    programs = tl.num_programs(0)
    tl.store(normalisers + (term * programs + tl.program_id(0)) * context + rows, normaliser, mask=inside)
    at = (term * programs + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + at, tl.sum(tl.where(inside, normaliser - mean, 0.0), 0))
