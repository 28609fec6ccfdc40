"""The active features of a batch and their activations, found on a CPU without touching the others.

Products that are not exact choose the features; activations are computed anew in float32. TopK has products in int8
choose some features more than wanted, where the CPU multiplies int8 fastest, and the exact values choose among them:
on SmolLM2's layer 8 that misses one in 700 of the sixteen largest, where bfloat16 alone misses one in 200.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from qkmodel.kernels import int8_cpu
from qkmodel.kernels.choice_cpu import (
    choose_largest,
    choose_largest_of_batch,
    choose_largest_of_products,
    choose_positive,
    count_positive,
    keep_largest,
)
from qkmodel.kernels.numerics_cpu import as_array
from qkmodel.kernels.sparse_cpu import encode_chosen
from qkmodel.products import multiplies_int8, product_dtype
from qkmodel.sparsity import BatchTopK, ReLU, TopK
from qkmodel.transcoder import Transcoder

# Up to this share of active features they are picked out. On a CPU that costs in proportion to them, unlike a dense
# product.
SPARSE_SHARE = 1 / 16


@dataclass(frozen=True)
class CentredInputs:
    """A batch's inputs less their mean, which all members of a pack read; `rounded` in the products' element type.

    `int8` is None where features are not chosen from such products.
    """

    x: Float[Tensor, "tokens d_model"]
    rounded: Float[Tensor, "tokens d_model"]
    int8: int8_cpu.RoundedRows | None
    context: int


def centred_inputs(centred: Float[Tensor, "batch context d_model"], dtype: torch.dtype) -> CentredInputs:
    """What members read of inputs less their mean; products are made in `dtype`."""
    x = centred.flatten(0, 1)
    int8 = int8_cpu.round_rows(x) if multiplies_int8(dtype, x.device) else None
    return CentredInputs(x, x.to(dtype), int8, centred.shape[1])


@dataclass(frozen=True)
class Code:
    """Active features: token t has `features[starts[t]:starts[t + 1]]` with `values` beside them."""

    starts: Int[np.ndarray, "tokens+1"]
    features: Int[np.ndarray, "active"]
    values: Float[np.ndarray, "active"]


def is_sparse(activation: TopK | BatchTopK, features: int) -> bool:
    """Whether so few of the features are active that they are picked out."""
    return activation.k <= SPARSE_SHARE * features


def training_code(transcoder: Transcoder, inputs: CentredInputs) -> Code | None:
    """The active features of a batch that is trained on; None where they are too many, or others matter too."""
    activation = transcoder.activation
    if isinstance(activation, TopK) and is_sparse(activation, transcoder.features):
        return _encode_largest(transcoder, inputs, activation.k)
    if isinstance(activation, BatchTopK) and is_sparse(activation, transcoder.features):
        return _encode_largest_of_batch(transcoder, activation, inputs)
    if isinstance(activation, ReLU):
        return _encode_few_positive(transcoder, inputs)
    return None


def exact_code(transcoder: Transcoder, centred: Float[Tensor, "batch context d_model"], k: int) -> Code:
    """The k largest features of each token; rounded products choose twice as many, and exact ones among these."""
    x, dtype = centred.flatten(0, 1), product_dtype("auto", centred.device)
    inputs = CentredInputs(x, x.to(dtype), None, centred.shape[1])
    count = min(2 * k, transcoder.features)
    return _largest(k, _with_values(transcoder, inputs, *_choose_largest(transcoder, inputs, count)))


def _encode_largest(transcoder: Transcoder, inputs: CentredInputs, k: int) -> Code:
    """The k largest features of each token."""
    if inputs.int8 is None:
        return _with_values(transcoder, inputs, *_choose_largest(transcoder, inputs, k))
    weights, bias = int8_cpu.round_rows(transcoder.W_enc.detach()), as_array(transcoder.b_enc)
    products = int8_cpu.products(inputs.int8, weights).numpy()
    count = min(k + max(4, k // 4), transcoder.features)
    starts, features = _room(len(products), len(products) * count)
    choose_largest_of_products(products, inputs.int8.scales, weights.scales, bias, count, starts, features)
    return _largest(k, _with_values(transcoder, inputs, starts, features))


def _choose_largest(transcoder: Transcoder, inputs: CentredInputs, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and features by products in the inputs' element type."""
    bits = _pre_activation_bits(transcoder, inputs)
    starts, features = _room(len(bits), len(bits) * count)
    choose_largest(bits, count, starts, features)
    return starts, features


def _largest(k: int, code: Code) -> Code:
    """What is left of a code, whose arrays are written over, with the k largest values of each token."""
    left = keep_largest(k, code.starts, code.features, code.values)
    return Code(code.starts, code.features[:left], code.values[:left])


def _encode_largest_of_batch(transcoder: Transcoder, activation: BatchTopK, inputs: CentredInputs) -> Code:
    """The largest features of the batch; the activation's threshold moves towards the smallest of them.

    That is the one that chose, from rounded products: the least exact value among the chosen is that of a feature
    which rounding lifted over it, and lies lower (by 0.7 % on SmolLM2's layer 8, which is 1.5 % in l0).
    """
    bits = _pre_activation_bits(transcoder, inputs)
    batch = len(bits) // inputs.context
    budget = activation.budget(batch, inputs.context)
    starts, features = _room(len(bits), budget + batch * bits.shape[1])
    smallest = choose_largest_of_batch(bits, inputs.context, budget, starts, features)
    # with fewer positive ones than the budget everything positive is kept
    kept = torch.from_numpy(np.array(smallest if smallest > 1 else 0, bits.dtype)).view(inputs.rounded.dtype)
    activation.follow(kept.float())
    return _with_values(transcoder, inputs, starts, features)


def _encode_few_positive(transcoder: Transcoder, inputs: CentredInputs) -> Code | None:
    """All positive features; None if they are too many for the sparse way to be the faster one."""
    bits = _pre_activation_bits(transcoder, inputs)
    count = count_positive(bits)
    if count > SPARSE_SHARE * bits.size:
        return None
    starts, features = _room(len(bits), count)
    choose_positive(bits, starts, features)
    return _with_values(transcoder, inputs, starts, features)


def _room(tokens: int, features: int) -> tuple[np.ndarray, np.ndarray]:
    return np.empty(tokens + 1, np.int64), np.empty(features, np.int32)


def _pre_activation_bits(transcoder: Transcoder, inputs: CentredInputs) -> np.ndarray:
    pre = pre_activations(transcoder, inputs)
    return pre.view(torch.int16 if pre.dtype == torch.bfloat16 else torch.int32).numpy()


@torch.no_grad()
def pre_activations(transcoder: Transcoder, inputs: CentredInputs) -> Float[Tensor, "tokens features"]:
    """Encoder outputs in the products' element type, without gradients."""
    dtype = inputs.rounded.dtype
    return torch.nn.functional.linear(inputs.rounded, transcoder.W_enc.to(dtype), transcoder.b_enc.to(dtype))


def _with_values(transcoder: Transcoder, inputs: CentredInputs, starts: np.ndarray, features: np.ndarray) -> Code:
    features = features[: starts[-1]]
    values = np.empty(len(features), np.float32)
    encode_chosen(as_array(inputs.x), as_array(transcoder.W_enc), as_array(transcoder.b_enc), starts, features, values)
    return Code(starts, features, values)
