"""The query and key transcoders: sparse dictionaries from the layer's input to its queries and keys."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import jvp, vjp

from qkmodel.attention import AttentionLayer
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.sparsity import Activation, JumpReLU, make_activation

# Features overlap, so that at full strength their sum overshoots the projection they stand for. Measured on SmolLM2
# (benchmarks/initialisation.py): 0.3 ends at two thirds of the KL that 1 ends at, for TopK and ReLU alike.
INITIAL_DECODER_SCALE = 0.3


class Transcoder(nn.Module):
    """f = act(W_enc (x − b_pre) + b_enc);  ŷ = f W_dec + b_out.

    Shapes: `W_enc` [features, d_model], `b_enc` [features], `W_dec` [features, d_out], `b_out` [d_out];
    the buffer `b_pre` [d_model] is the mean input. `b_pre` is not trained: `b_enc` can express every
    change of it, and fixed it lets all members of a pack share one centred batch. Decoder rows keep whatever norm
    they learn: penalties look at f·‖w_dec‖, and TopK at the order of f, so no norm is there to be exploited.
    """

    def __init__(
        self, features: int, b_pre: Float[Tensor, "d_model"], b_out: Float[Tensor, "d_out"], activation: Activation
    ) -> None:
        super().__init__()
        self.activation = activation
        self.register_buffer("b_pre", b_pre.clone())
        self.W_enc = nn.Parameter(torch.zeros(features, b_pre.numel()))
        self.b_enc = nn.Parameter(torch.zeros(features))
        self.W_dec = nn.Parameter(torch.zeros(features, b_out.numel()))
        self.b_out = nn.Parameter(b_out.clone())

    @property
    def features(self) -> int:
        return self.b_enc.numel()

    def encode(self, x: Float[Tensor, "*tokens d_model"]) -> Float[Tensor, "*tokens features"]:
        """Feature activations, non-negative."""
        return self.activation(nn.functional.linear(x - self.b_pre, self.W_enc, self.b_enc))

    def decode(self, f: Float[Tensor, "*tokens features"]) -> Float[Tensor, "*tokens d_out"]:
        """Flattened queries (or keys) from feature activations."""
        return f @ self.W_dec + self.b_out

    def forward(self, x: Float[Tensor, "*tokens d_model"]) -> Float[Tensor, "*tokens d_out"]:
        return self.decode(self.encode(x))

    def decoder_norms(self) -> Float[Tensor, "features"]:
        """‖w_dec‖ of each feature: the scale that a penalty multiplies activations with."""
        return self.W_dec.norm(dim=-1)


class QKTranscoder(nn.Module):
    """A query transcoder and a key transcoder that read the same input.

    Both stand for projection *and* q/k norm: what they write is what enters the rotary embedding.
    """

    def __init__(self, query: Transcoder, key: Transcoder) -> None:
        super().__init__()
        self.query = query
        self.key = key

    def forward(
        self, x: Float[Tensor, "*tokens d_model"]
    ) -> tuple[Float[Tensor, "*tokens query_width"], Float[Tensor, "*tokens key_width"]]:
        """Reconstructed queries `[…, n_heads·d_head]` and keys `[…, n_kv_heads·d_head]`."""
        return self.query(x), self.key(x)


def empty_qk_transcoder(hyperparameters: Hyperparameters, layer: AttentionLayer) -> QKTranscoder:
    """A QKTranscoder of the right shapes whose numbers are still to be loaded."""
    geometry = layer.geometry
    d_in = torch.zeros(geometry.d_model)
    sides = ((hyperparameters.query_side, geometry.n_heads), (hyperparameters.key_side, geometry.n_kv_heads))
    return QKTranscoder(
        *(
            Transcoder(side.dictionary_size, d_in, torch.zeros(heads * geometry.d_head), make_activation(side))
            for side, heads in sides
        )
    )


def initialise_qk_transcoder(
    hyperparameters: Hyperparameters,
    layer: AttentionLayer,
    mean_input: Float[Tensor, "d_model"],
    mean_query: Float[Tensor, "query_width"],
    mean_key: Float[Tensor, "key_width"],
    input_rms: float,
) -> QKTranscoder:
    """A fresh QKTranscoder; everything random comes from `hyperparameters.seed`.

    Encoder rows are unit vectors drawn in the row space of the layer's projection, and each decoder row
    is `INITIAL_DECODER_SCALE` times what the projection itself writes for its encoder row, so a feature
    starts out writing in the direction in which the model writes for it. Both come from the projection's
    derivative at the mean input, which is W_Q (W_K) itself where no q/k norm follows and its linearisation
    where one does. `b_out` is the mean query (key). JumpReLU's thresholds start at `input_rms`, about a
    standard deviation of the pre-activations.
    """
    transcoder = empty_qk_transcoder(hyperparameters, layer).to(mean_input.device)
    generator = torch.Generator().manual_seed(hyperparameters.seed)
    for side, index, mean_output in ((transcoder.query, 0, mean_query), (transcoder.key, 1, mean_key)):
        encoder, decoder = _rows_of_projection(layer, index, mean_input, side.features, generator)
        with torch.no_grad():
            side.b_pre.copy_(mean_input)
            side.b_out.copy_(mean_output)
            side.W_enc.copy_(encoder)
            side.W_dec.copy_(INITIAL_DECODER_SCALE * decoder)
            if isinstance(side.activation, JumpReLU):
                side.activation.log_threshold.fill_(math.log(input_rms))
    return transcoder


def _rows_of_projection(
    layer: AttentionLayer, index: int, mean_input: Float[Tensor, "d_model"], features: int, generator: torch.Generator
) -> tuple[Float[Tensor, "features d_model"], Float[Tensor, "features d_out"]]:
    def project(x: Float[Tensor, "1 features d_model"]) -> Float[Tensor, "1 features d_out"]:
        return layer.project(x)[index].flatten(-2)

    at = mean_input.repeat(1, features, 1)
    output, pull_back = vjp(project, at)
    # numbers from the CPU, so that a seed means the same everywhere
    cotangents = torch.randn(output.shape, generator=generator).to(output.device)
    (rows,) = pull_back(cotangents)
    encoder = nn.functional.normalize(rows, dim=-1)
    _, decoder = jvp(project, (at,), (encoder,))
    return encoder[0], decoder[0]
