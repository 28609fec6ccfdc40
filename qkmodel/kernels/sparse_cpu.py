"""Sparse transcoders on a CPU: once a few features per token are chosen, nothing else is touched again.

The activations of the chosen ones are computed anew in float32, whatever they were chosen by. A `code` is (starts,
features, values): token t activates `features[starts[t]:starts[t + 1]]`.
"""

import numpy as np

from qkmodel.kernels.machine_code import inlined, kernel
from qkmodel.kernels.numerics_cpu import number


@kernel
def encode_chosen(x, w_enc, b_enc, starts, features, values):
    """Activations max(w_i·x + b_i, 0) of the chosen features."""
    nothing = b_enc.dtype.type(0.0)
    for token in range(x.shape[0]):
        row = x[token]
        for place in range(starts[token], starts[token + 1], 4):
            m, n, o, p = _four(place, starts[token + 1])
            w_m, w_n, w_o, w_p = w_enc[features[m]], w_enc[features[n]], w_enc[features[o]], w_enc[features[p]]
            pre_m, pre_n, pre_o, pre_p = nothing, nothing, nothing, nothing
            for d in range(row.size):
                pre_m += row[d] * w_m[d]
                pre_n += row[d] * w_n[d]
                pre_o += row[d] * w_o[d]
                pre_p += row[d] * w_p[d]
            values[m] = max(pre_m + b_enc[features[m]], nothing)
            values[n] = max(pre_n + b_enc[features[n]], nothing)
            values[o] = max(pre_o + b_enc[features[o]], nothing)
            values[p] = max(pre_p + b_enc[features[p]], nothing)


@kernel
def decode_chosen(starts, features, values, w_dec, b_out, y):
    """y = Σ f_i w_dec_i + b_out."""
    for token in range(y.shape[0]):
        row = y[token]
        for d in range(row.size):
            row[d] = b_out[d]
        for place in range(starts[token], starts[token + 1], 4):
            m, n, o, p = _four(place, starts[token + 1])
            w_m, w_n, w_o, w_p = w_dec[features[m]], w_dec[features[n]], w_dec[features[o]], w_dec[features[p]]
            f_m, f_n, f_o, f_p = _each_once(values, m, n, o, p)
            for d in range(row.size):
                row[d] += f_m * w_m[d] + f_n * w_n[d] + f_o * w_o[d] + f_p * w_p[d]


@kernel
def gradients(x, starts, features, values, w_dec, dy, d_values, g_w_enc, g_b_enc, g_w_dec):
    """Gradients of encoder and decoder, given those of the decoder's output and of the values themselves.

    `x` and `dy` may be bfloat16. `d_values` may be empty: the values then have none of their own. Goes feature by
    feature, so that a feature's gradients stay in the core's cache until they are whole.
    """
    nothing = w_dec.dtype.type(0.0)
    first, places, tokens = _by_feature(starts, features, w_dec.shape[0])
    f, df = values[places], np.zeros(places.size, w_dec.dtype)
    if d_values.size > 0:
        df[:] = d_values[places]
    for i in range(w_dec.shape[0]):
        w, g_enc, g_dec = w_dec[i], g_w_enc[i], g_w_dec[i]
        g_b_enc[i], g_enc[:], g_dec[:] = nothing, nothing, nothing
        for place in range(first[i], first[i + 1], 4):
            m, n, o, p = _four(place, first[i + 1])
            dy_m, dy_n, dy_o, dy_p = dy[tokens[m]], dy[tokens[n]], dy[tokens[o]], dy[tokens[p]]
            f_m, f_n, f_o, f_p = _each_once(f, m, n, o, p)
            df_m, df_n, df_o, df_p = df[m], df[n], df[o], df[p]
            for d in range(w.size):
                df_m += number(dy_m[d]) * w[d]
                df_n += number(dy_n[d]) * w[d]
                df_o += number(dy_o[d]) * w[d]
                df_p += number(dy_p[d]) * w[d]
            for d in range(w.size):
                g_dec[d] += (
                    f_m * number(dy_m[d]) + f_n * number(dy_n[d]) + f_o * number(dy_o[d]) + f_p * number(dy_p[d])
                )
            df_m, df_n = df_m if f_m > 0 else nothing, df_n if f_n > 0 else nothing
            df_o, df_p = df_o if f_o > 0 else nothing, df_p if f_p > 0 else nothing
            x_m, x_n, x_o, x_p = x[tokens[m]], x[tokens[n]], x[tokens[o]], x[tokens[p]]
            for d in range(g_enc.size):
                g_enc[d] += (
                    df_m * number(x_m[d]) + df_n * number(x_n[d]) + df_o * number(x_o[d]) + df_p * number(x_p[d])
                )
            g_b_enc[i] += df_m + df_n + df_o + df_p


@inlined
def _four(place, end):
    """Four places, taken at once so that memory is waited for once; the last comes again where fewer are left."""
    last = end - 1
    return place, min(place + 1, last), min(place + 2, last), min(place + 3, last)


@inlined
def _each_once(values, m, n, o, p):
    """The values at four places, 0 where a place comes again."""
    nothing = values.dtype.type(0.0)
    return (
        values[m],
        values[n] if n > m else nothing,
        values[o] if o > n else nothing,
        values[p] if p > o else nothing,
    )


@inlined
def _by_feature(starts, features, count):
    """The code in the order of features: `first` [count + 1], and for each activation its place and its token."""
    first = np.zeros(count + 1, np.int64)
    for place in range(features.size):
        first[features[place] + 1] += 1
    for i in range(count):
        first[i + 1] += first[i]
    places, tokens = np.empty(features.size, np.int64), np.empty(features.size, np.int64)
    following = first[:-1].copy()
    for token in range(len(starts) - 1):
        for place in range(starts[token], starts[token + 1]):
            n = following[features[place]]
            following[features[place]] += 1
            places[n], tokens[n] = place, token
    return first, places, tokens


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
