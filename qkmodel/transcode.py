"""How one side of a transcoder runs in bulk: from inputs to reconstructed queries or keys, in training and evaluation.

Where few features are active a batch goes a sparse way: on the CPU with TopK, BatchTopK, and ReLU once it has become
sparse, which then does not touch the others again, since their gradients are zero; on a GPU with TopK. Everything else
is dense. All ways give the same numbers up to rounding.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from qkmodel.kernels.numerics_cpu import as_array
from qkmodel.kernels.sparse_cpu import (
    add_gradients,
    choose_largest,
    choose_largest_of_batch,
    choose_positive,
    count_active,
    count_fired,
    count_positive,
    decode_chosen,
    encode_chosen,
    keep_largest,
)
from qkmodel.products import linear, product_dtype
from qkmodel.sparsity import BatchTopK, ReLU, TopK
from qkmodel.transcoder import Transcoder

# Up to this share of active features they are picked out. On a CPU that costs in proportion to them, unlike a dense
# product.
SPARSE_SHARE = 1 / 16
# Up to this many features a GPU picks them out: one program holds a token's pre-activations.
MOST_ON_GPU = 32_768


@dataclass(frozen=True)
class CentredInputs:
    """A batch's inputs less their mean, which all members of a pack read; `rounded` in the products' element type."""

    x: Float[Tensor, "tokens d_model"]
    rounded: Float[Tensor, "tokens d_model"]
    context: int


@dataclass(frozen=True)
class Side:
    """What one side made of a batch.

    `pre` are the encoder's outputs, None on the sparse way. `f` are the activations: of all features or, on the sparse
    way, flat, of those numbered in `features`. All carry gradients, but for `f` on a GPU's sparse way, where a token
    that has fewer features has feature 0 with a zero besides: no TopK has a penalty. `active` counts active features,
    position 0 left out; a tensor where counting would wait for a GPU.
    """

    y: Float[Tensor, "tokens d_out"]
    pre: Float[Tensor, "batch context features"] | None
    f: Float[Tensor, "batch context features"] | Float[Tensor, "active"]
    features: Int[Tensor, "active"] | None
    active: Int[Tensor, ""] | int

    def scaled(self, norms: Float[Tensor, "features"]) -> Tensor:
        """f times each feature's norm, in the shape of `f`."""
        return self.f * (norms if self.features is None else norms[self.features])


@dataclass(frozen=True)
class Code:
    """Active features: token t has `features[starts[t]:starts[t + 1]]` with `values` beside them."""

    starts: np.ndarray
    features: np.ndarray
    values: np.ndarray


def transcode(transcoder: Transcoder, inputs: CentredInputs) -> Side:
    """Reconstructed outputs of a batch that is trained on."""
    activation = transcoder.activation
    if inputs.x.device.type == "cuda":
        if isinstance(activation, TopK) and _is_sparse(transcoder) and transcoder.features <= MOST_ON_GPU:
            return _transcode_largest_on_gpu(transcoder, inputs)
    elif (code := _training_code(transcoder, inputs)) is not None:
        return _transcode_sparsely(transcoder, inputs, code)
    dtype = inputs.rounded.dtype
    pre = linear(inputs.rounded, transcoder.W_enc, transcoder.b_enc, dtype)
    pre = pre.unflatten(0, (-1, inputs.context))
    f = activation.training_forward(pre)
    y = linear(f.flatten(0, 1), transcoder.W_dec.mT, transcoder.b_out, dtype)
    return Side(y, pre, f, None, (f.detach()[:, 1:] > 0).sum())


@torch.no_grad()
def infer(
    transcoder: Transcoder, x: Float[Tensor, "batch context d_model"]
) -> tuple[Float[Tensor, "batch context d_out"], np.ndarray]:
    """What the dictionary as it stands makes of `x`, in float32, and how often each feature is active [features].

    The same as calling it, up to rounding. Position 0 does not count as activity.
    """
    centred = (x - transcoder.b_pre).flatten(0, 1)
    inputs = CentredInputs(centred, centred.to(product_dtype("auto", x.device)), x.shape[1])
    counts = np.zeros(transcoder.features, np.int64)
    if isinstance(transcoder.activation, TopK) and x.device.type == "cpu" and _is_sparse(transcoder):
        k = transcoder.activation.k
        # rounded products choose twice as many as wanted, and exact ones among these
        code = _encode_largest(transcoder, inputs, min(2 * k, transcoder.features))
        keep_largest(k, code.starts, code.values)
        count_fired(inputs.context, code.starts, code.features, code.values, counts)
        y = torch.empty(len(centred), len(transcoder.b_out))
        w_dec, b_out = as_array(transcoder.W_dec), as_array(transcoder.b_out)
        decode_chosen(code.starts, code.features, code.values, w_dec, b_out, as_array(y))
        return y.view(*x.shape[:2], -1), counts
    f = transcoder.encode(x)
    counts += (f[:, 1:] > 0).flatten(0, 1).sum(0).numpy(force=True)
    return transcoder.decode(f), counts


def _is_sparse(transcoder: Transcoder) -> bool:
    return transcoder.activation.k <= SPARSE_SHARE * transcoder.features


def _training_code(transcoder: Transcoder, inputs: CentredInputs) -> Code | None:
    """The active features of a batch that is trained on; None where they are too many, or others matter too."""
    activation = transcoder.activation
    if isinstance(activation, TopK) and _is_sparse(transcoder):
        return _encode_largest(transcoder, inputs, activation.k)
    if isinstance(activation, BatchTopK) and _is_sparse(transcoder):
        return _encode_largest_of_batch(transcoder, activation, inputs)
    if isinstance(activation, ReLU):
        return _encode_few_positive(transcoder, inputs)
    return None


def _transcode_sparsely(transcoder: Transcoder, inputs: CentredInputs, code: Code) -> Side:
    weights = (transcoder.W_enc, transcoder.b_enc, transcoder.W_dec, transcoder.b_out)
    y, f = _SparseTranscoder.apply(*weights, inputs.x, code)
    active = count_active(inputs.context, code.starts, code.values)
    return Side(y, None, f, torch.from_numpy(code.features).long(), active)


def _transcode_largest_on_gpu(transcoder: Transcoder, inputs: CentredInputs) -> Side:
    # Triton comes with torch's CUDA builds only
    from qkmodel.kernels.sparse_triton import SparseTopK, choose

    chosen = choose(_pre_activations(transcoder, inputs), transcoder.activation.k)
    weights = (transcoder.W_enc, transcoder.b_enc, transcoder.W_dec, transcoder.b_out)
    y, values, active = SparseTopK.apply(*weights, inputs.x, inputs.rounded, chosen)
    counted = active.view(-1, inputs.context)[:, 1:].sum()
    return Side(y, None, values.flatten(), chosen.features.flatten(), counted)


def _encode_largest(transcoder: Transcoder, inputs: CentredInputs, count: int) -> Code:
    """The `count` largest features of each token."""
    bits = _pre_activation_bits(transcoder, inputs)
    starts, features = np.empty(len(bits) + 1, np.int64), np.empty(len(bits) * count, np.int32)
    choose_largest(bits, count, starts, features)
    return _with_values(transcoder, inputs, starts, features)


def _encode_largest_of_batch(transcoder: Transcoder, activation: BatchTopK, inputs: CentredInputs) -> Code:
    """The largest features of the batch; the activation's threshold moves towards the smallest of them.

    That is the one that chose, from rounded products: the least exact value among the chosen is that of a feature
    which rounding lifted over it, and lies lower (by 0.7 % on SmolLM2's layer 8, which is 1.5 % in l0).
    """
    bits = _pre_activation_bits(transcoder, inputs)
    batch = len(bits) // inputs.context
    budget = activation.budget(batch, inputs.context)
    starts, features = np.empty(len(bits) + 1, np.int64), np.empty(budget + batch * bits.shape[1], np.int32)
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
    starts, features = np.empty(len(bits) + 1, np.int64), np.empty(count, np.int32)
    choose_positive(bits, starts, features)
    return _with_values(transcoder, inputs, starts, features)


def _pre_activation_bits(transcoder: Transcoder, inputs: CentredInputs) -> np.ndarray:
    pre = _pre_activations(transcoder, inputs)
    return pre.view(torch.int16 if pre.dtype == torch.bfloat16 else torch.int32).numpy()


@torch.no_grad()
def _pre_activations(transcoder: Transcoder, inputs: CentredInputs) -> Float[Tensor, "tokens features"]:
    """In the products' element type."""
    dtype = inputs.rounded.dtype
    return torch.nn.functional.linear(inputs.rounded, transcoder.W_enc.to(dtype), transcoder.b_enc.to(dtype))


def _with_values(transcoder: Transcoder, inputs: CentredInputs, starts: np.ndarray, features: np.ndarray) -> Code:
    features = features[: starts[-1]]
    values = np.empty(len(features), np.float32)
    encode_chosen(as_array(inputs.x), as_array(transcoder.W_enc), as_array(transcoder.b_enc), starts, features, values)
    return Code(starts, features, values)


class _SparseTranscoder(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        w_enc: Float[Tensor, "features d_model"],
        b_enc: Float[Tensor, "features"],
        w_dec: Float[Tensor, "features d_out"],
        b_out: Float[Tensor, "d_out"],
        x: Float[Tensor, "tokens d_model"],
        code: Code,
    ) -> tuple[Float[Tensor, "tokens d_out"], Float[Tensor, "active"]]:
        y = torch.empty(len(x), len(b_out))
        decode_chosen(code.starts, code.features, code.values, as_array(w_dec), as_array(b_out), as_array(y))
        ctx.save_for_backward(w_dec, x)
        ctx.code = code
        ctx.set_materialize_grads(False)
        return y, torch.from_numpy(code.values)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, dy: Float[Tensor, "tokens d_out"], d_values: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
        w_dec, x = ctx.saved_tensors
        gradients = (
            torch.zeros(len(w_dec), x.shape[1]),
            torch.zeros(len(w_dec)),
            torch.zeros_like(w_dec),
            torch.zeros(w_dec.shape[1]),
        )
        code = ctx.code
        add_gradients(
            as_array(x),
            code.starts,
            code.features,
            code.values,
            as_array(w_dec),
            as_array(dy.contiguous()),
            as_array(d_values.contiguous()) if d_values is not None else code.values[:0],
            *map(as_array, gradients),
        )
        return *gradients, None, None
