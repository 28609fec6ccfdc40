"""TopK transcoders on a GPU: what `choice_cpu` and `sparse_cpu` do, with what a GPU is good at left dense.

Pre-activations are a dense product in the products' element type that only chooses; activations of the chosen are
computed anew in float32 and decoded row by row, and so are their gradients. The gradients of the weights are dense
products of the code, spread out over all features, with the inputs and with dy: tensor cores need less time for
all features than gathering takes for the active ones. A program has a token, so nothing is accumulated atomically:
equal inputs give equal bits. No launch waits for the GPU or depends on data, so CUDA graphs may capture all of it.
"""

from typing import NamedTuple

import torch
import triton
from jaxtyping import Float, Int32
from torch import Tensor

from qkmodel.kernels.sparse_triton_kernels import choose_largest, encode_and_decode, spread_code
from qkmodel.products import column_sums, product

# Rows of weights that a program takes in at a time. Rows of over 4,096 numbers spill registers, and are slow.
STEP = 4
# Features whose largest stands for all of them: few enough that two of the chosen seldom meet in one.
GROUP = 4


class Chosen(NamedTuple):
    """The features of each token, `counts` of them and in no order; what follows in a row means nothing."""

    features: Int32[Tensor, "tokens k"]
    counts: Int32[Tensor, "tokens"]


def choose(pre: Float[Tensor, "tokens features"], k: int) -> Chosen:
    """The k largest positive pre-activations (bfloat16 or float32) of each token, the first of equal ones."""
    tokens, width = pre.shape
    # positive floats are ordered as their bits are; `near` is four halvings of a number
    bits, near = (pre.view(torch.int16), 511) if pre.dtype == torch.bfloat16 else (pre.view(torch.int32), 511 << 16)
    features, counts = pre.new_empty(tokens, k, dtype=torch.int32), pre.new_empty(tokens, dtype=torch.int32)
    cursors = torch.zeros_like(counts)
    row = max(GROUP, triton.next_power_of_2(width))
    options = {"K": k, "NEAR": near, "GROUP": GROUP, "ROW": row, "num_warps": warps_of(row)}
    choose_largest[(tokens,)](bits, features, counts, cursors, width, **options)
    return Chosen(features, counts)


def warps_of(row: int) -> int:
    """Of a program that holds a row of pre-activations in registers: 32 numbers for each thread."""
    return min(32, max(1, row // 1024))


class SparseTopK(torch.autograd.Function):
    """y, the values of the chosen features, and how many are over 0, from weights, inputs and which are chosen.

    Differentiates y by the weights. `rounded` are the inputs in the products' element type.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        w_enc: Float[Tensor, "features d_in"],
        b_enc: Float[Tensor, "features"],
        w_dec: Float[Tensor, "features d_out"],
        b_out: Float[Tensor, "d_out"],
        x: Float[Tensor, "tokens d_in"],
        rounded: Float[Tensor, "tokens d_in"],
        chosen: Chosen,
    ) -> tuple[Float[Tensor, "tokens d_out"], Float[Tensor, "tokens k"], Int32[Tensor, "tokens"]]:
        (tokens, k), d_in, d_out = chosen.features.shape, x.shape[1], len(b_out)
        values, y, active = x.new_empty(tokens, k), x.new_empty(tokens, d_out), torch.empty_like(chosen.counts)
        encode_and_decode[(tokens,)](
            x, w_enc, b_enc, w_dec, b_out, *chosen, values, y, active, d_in, d_out,
            K=k, PLACES=max(2, triton.next_power_of_2(k)), STEP=_step(k),
            DEPTH_IN=triton.next_power_of_2(d_in), DEPTH_OUT=triton.next_power_of_2(d_out),
        )  # fmt: skip
        ctx.save_for_backward(w_dec, rounded, *chosen, values)
        ctx.mark_non_differentiable(values, active)
        return y, values, active

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, dy: Float[Tensor, "tokens d_out"], *_: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None, None]:
        w_dec, rounded, features, counts, values = ctx.saved_tensors
        (tokens, k), (width, d_out), dy = features.shape, w_dec.shape, dy.contiguous()
        all_values, all_gradients = (rounded.new_empty(tokens, width) for _ in range(2))
        rounded_dy = torch.empty_like(dy, dtype=rounded.dtype)
        spread_code[(tokens,)](
            dy, w_dec, features, counts, values, all_values, all_gradients, rounded_dy, width, d_out,
            K=k, STEP=_step(k), DEPTH_OUT=triton.next_power_of_2(d_out), ROW=triton.next_power_of_2(width),
        )  # fmt: skip
        g_w_enc, g_w_dec = product(all_gradients.mT, rounded), product(all_values.mT, rounded_dy)
        return g_w_enc, column_sums(all_gradients), g_w_dec, column_sums(dy), None, None, None


def _step(k: int) -> int:
    return min(STEP, triton.next_power_of_2(k))
