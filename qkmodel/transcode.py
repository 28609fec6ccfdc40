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
from qkmodel.kernels.sparse_cpu import count_active, count_fired, decode_chosen, gradients
from qkmodel.products import column_sums, linear
from qkmodel.sparse_code import CentredInputs, Code, exact_code, is_sparse, pre_activations, training_code
from qkmodel.sparsity import TopK
from qkmodel.transcoder import Transcoder

# Up to this many features a GPU picks them out: one program holds a token's pre-activations.
MOST_ON_GPU = 32_768


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


def transcode(transcoder: Transcoder, inputs: CentredInputs) -> Side:
    """Reconstructed outputs of a batch that is trained on."""
    activation = transcoder.activation
    if inputs.x.device.type == "cuda":
        few = isinstance(activation, TopK) and is_sparse(activation, transcoder.features)
        if few and transcoder.features <= MOST_ON_GPU:
            return _transcode_largest_on_gpu(transcoder, inputs)
    elif (code := training_code(transcoder, inputs)) is not None:
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
    counts, activation = np.zeros(transcoder.features, np.int64), transcoder.activation
    if isinstance(activation, TopK) and x.device.type == "cpu" and is_sparse(activation, transcoder.features):
        code = exact_code(transcoder, x - transcoder.b_pre, activation.k)
        count_fired(x.shape[1], code.starts, code.features, code.values, counts)
        y = torch.empty(x.shape[0] * x.shape[1], len(transcoder.b_out))
        w_dec, b_out = as_array(transcoder.W_dec), as_array(transcoder.b_out)
        decode_chosen(code.starts, code.features, code.values, w_dec, b_out, as_array(y))
        return y.view(*x.shape[:2], -1), counts
    f = transcoder.encode(x)
    counts += (f[:, 1:] > 0).flatten(0, 1).sum(0).numpy(force=True)
    return transcoder.decode(f), counts


def _transcode_sparsely(transcoder: Transcoder, inputs: CentredInputs, code: Code) -> Side:
    weights = (transcoder.W_enc, transcoder.b_enc, transcoder.W_dec, transcoder.b_out)
    y, f = _SparseTranscoder.apply(*weights, inputs.rounded, code)
    active = count_active(inputs.context, code.starts, code.values)
    return Side(y, None, f, torch.from_numpy(code.features).long(), active)


def _transcode_largest_on_gpu(transcoder: Transcoder, inputs: CentredInputs) -> Side:
    # Triton comes with torch's CUDA builds only
    from qkmodel.kernels.sparse_triton import SparseTopK, choose

    chosen = choose(pre_activations(transcoder, inputs), transcoder.activation.k)
    weights = (transcoder.W_enc, transcoder.b_enc, transcoder.W_dec, transcoder.b_out)
    y, values, active = SparseTopK.apply(*weights, inputs.x, inputs.rounded, chosen)
    counted = active.view(-1, inputs.context)[:, 1:].sum()
    return Side(y, None, values.flatten(), chosen.features.flatten(), counted)


class _SparseTranscoder(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        w_enc: Float[Tensor, "features d_model"],
        b_enc: Float[Tensor, "features"],
        w_dec: Float[Tensor, "features d_out"],
        b_out: Float[Tensor, "d_out"],
        rounded: Float[Tensor, "tokens d_model"],
        code: Code,
    ) -> tuple[Float[Tensor, "tokens d_out"], Float[Tensor, "active"]]:
        y = torch.empty(len(rounded), len(b_out))
        decode_chosen(code.starts, code.features, code.values, as_array(w_dec), as_array(b_out), as_array(y))
        ctx.save_for_backward(w_dec, rounded)
        ctx.code = code
        ctx.set_materialize_grads(False)
        return y, torch.from_numpy(code.values)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, dy: Float[Tensor, "tokens d_out"], d_values: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
        w_dec, rounded = ctx.saved_tensors
        g_w_enc, g_b_enc = torch.empty(len(w_dec), rounded.shape[1]), torch.empty(len(w_dec))
        g_w_dec = torch.empty_like(w_dec)
        code = ctx.code
        # inputs and dy as a dense product would take them, which halves what is read
        gradients(
            as_array(rounded),
            code.starts,
            code.features,
            code.values,
            as_array(w_dec),
            as_array(dy.to(rounded.dtype).contiguous()),
            as_array(d_values.contiguous()) if d_values is not None else code.values[:0],
            *map(as_array, (g_w_enc, g_b_enc, g_w_dec)),
        )
        return g_w_enc, g_b_enc, g_w_dec, column_sums(dy), None, None
