"""Scalars inside compiled CPU loops: bfloat16 as the upper half of a float32; maximum and exponential that vectorise.

NumPy has no bfloat16, so kernels see such tensors as int16. `number` and `store` let one kernel serve arrays of
bfloat16 (int16), float32 and float64; Numba compiles the body that fits an array's type.
"""

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload
from torch import Tensor

from qkmodel.kernels.machine_code import INLINED


def as_array(tensor: Tensor) -> np.ndarray:
    """The same memory as a NumPy array; bfloat16 becomes int16."""
    tensor = tensor.detach()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


@intrinsic
def _bits_of(typing_context, value):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def _float_of(typing_context, bits):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def larger(typing_context, a, b):
    """max(a, b) of two floats that are numbers. A loop over Python's own `max` is not vectorised."""

    def generate(context, builder, signature, arguments):
        kind = arguments[0].type
        return builder.call(
            builder.module.declare_intrinsic("llvm.maxnum", [kind], ir.FunctionType(kind, [kind, kind])), arguments
        )

    return a(a, a), generate


def number(stored):
    """A stored element as a number. Like the two below, exists inside compiled code only."""


@overload(number, jit_options=INLINED)
def _number(stored):
    if isinstance(stored, types.Integer):
        return lambda stored: _float_of(np.int32(stored) << np.int32(16))
    return lambda stored: stored


def store(array, row, column, value):
    """Writes a number, rounded to nearest even where the array is bfloat16."""


@overload(store, jit_options=INLINED)
def _store(array, row, column, value):
    if isinstance(array.dtype, types.Integer):

        def store_bfloat16(array, row, column, value):
            bits = _bits_of(value)
            bits += np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))
            array[row, column] = np.int16(bits >> np.int32(16))

        return store_bfloat16

    def store_as_it_is(array, row, column, value):
        array[row, column] = value

    return store_as_it_is


def exponential(x):
    """exp(x) for x ≤ 0; in float32 to 2e-7 relative, and 0 below −87."""


@overload(exponential, jit_options=INLINED)
def _exponential(x):
    if x == types.float64:
        return lambda x: np.exp(x)

    def float32_exponential(x):
        # 2^n · e^r with |r| ≤ ln(2)/2; polynomial and split of ln(2) of the Cephes library's expf
        bounded = max(x, np.float32(-87.0))
        n = np.floor(bounded * np.float32(1.44269504) + np.float32(0.5))
        r = bounded - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
        p = np.float32(1.9875691500e-4)
        p = p * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        p = p * r * r + r + np.float32(1.0)
        value = _float_of(_bits_of(p) + (np.int32(n) << np.int32(23)))
        return value if x > np.float32(-87.0) else np.float32(0.0)

    return float32_exponential
