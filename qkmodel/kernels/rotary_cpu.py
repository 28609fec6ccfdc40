"""Rotary embedding, scale and head grouping of reconstructed queries and keys, and the way back for gradients.

One pass each instead of a dozen tensor operations. `pairs` counts key heads of sequences, batch · n_kv_heads.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qkmodel.attention import AttentionLayer
from qkmodel.kernels.machine_code import kernel
from qkmodel.kernels.numerics_cpu import as_array, number, store


def prepare(
    layer: AttentionLayer,
    y: Float[Tensor, "batch context heads d_head"],
    true: Float[Tensor, "pairs context_group d_head"],
    true_product: Float[Tensor, "pairs context_group d_head"],
    scale: float,
) -> tuple[Float[Tensor, "pairs context_group d_head"], Float[Tensor, "pairs context_group 2 d_head"]]:
    """Rotated, scaled and grouped queries (keys): their difference from the true ones, and both side by side.

    In the element type of `true_product`; the difference is taken before rounding.
    """
    difference = torch.empty_like(true_product)
    both = difference.new_empty(*difference.shape[:2], 2, difference.shape[2])
    cos, sin = _tables(layer, y)
    _rotate_in(
        as_array(y.flatten(0, 2)),
        as_array(true.flatten(0, 1)),
        as_array(true_product.flatten(0, 1)),
        cos,
        sin,
        layer.geometry.rotary_interleaved,
        scale,
        np.array([y.shape[1], y.shape[2], layer.geometry.n_kv_heads]),
        as_array(difference.flatten(0, 1)),
        as_array(both.flatten(0, 2)),
    )
    return difference, both


def restore(
    layer: AttentionLayer, gradient: Float[Tensor, "pairs context_group d_head"], shape: torch.Size, scale: float
) -> Float[Tensor, "batch context heads d_head"]:
    """The gradient with respect to what `prepare` was given, times `scale` / its own scale."""
    restored = torch.empty(shape, dtype=layer.w_q.dtype)
    cos, sin = _tables(layer, restored)
    _rotate_back(
        as_array(gradient.flatten(0, 1)),
        cos,
        sin,
        layer.geometry.rotary_interleaved,
        scale,
        np.array([shape[1], shape[2], layer.geometry.n_kv_heads]),
        as_array(restored.flatten(0, 2)),
    )
    return restored


def _tables(layer: AttentionLayer, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    if not layer.geometry.rotary_dim:
        empty = np.zeros((y.shape[1], 0), dtype=as_array(y).dtype)
        return empty, empty
    cos, sin = layer.rotary_table(y.shape[1])
    return as_array(cos[:, 0]), as_array(sin[:, 0])


@kernel
def _rotate_in(y, true, true_product, cos, sin, interleaved, scale, sizes, difference, both):
    context, heads, kv_heads = sizes
    group, d_head, half = heads // kv_heads, y.shape[1], cos.shape[1]
    scale = y.dtype.type(scale)
    turned = np.empty(d_head, y.dtype)
    for source in range(y.shape[0]):
        position = source // heads % context
        head = source % heads
        pair = source // (heads * context) * kv_heads + head // group
        target = (pair * context + position) * group + head % group
        for i in range(half):
            first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
            a, b = y[source, first] * scale, y[source, second] * scale
            turned[first] = a * cos[position, i] - b * sin[position, i]
            turned[second] = b * cos[position, i] + a * sin[position, i]
        for i in range(2 * half, d_head):
            turned[i] = y[source, i] * scale
        for i in range(d_head):
            store(both, 2 * target, i, turned[i])
        for i in range(d_head):
            both[2 * target + 1, i] = true_product[target, i]
        for i in range(d_head):
            store(difference, target, i, turned[i] - true[target, i])


@kernel
def _rotate_back(gradient, cos, sin, interleaved, scale, sizes, restored):
    context, heads, kv_heads = sizes
    group, d_head, half = heads // kv_heads, restored.shape[1], cos.shape[1]
    scale = restored.dtype.type(scale)
    for target in range(restored.shape[0]):
        position = target // heads % context
        head = target % heads
        pair = target // (heads * context) * kv_heads + head // group
        source = (pair * context + position) * group + head % group
        for i in range(half):
            first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
            a, b = number(gradient[source, first]) * scale, number(gradient[source, second]) * scale
            restored[target, first] = a * cos[position, i] + b * sin[position, i]
            restored[target, second] = b * cos[position, i] - a * sin[position, i]
        for i in range(2 * half, d_head):
            restored[target, i] = number(gradient[source, i]) * scale
