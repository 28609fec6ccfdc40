"""Pair masks written plainly: every pair of every head in one tensor, in float64 and differentiated by autograd."""

import torch
from jaxtyping import Float
from torch import Tensor

from qkmodel.attention import AttentionLayer
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.transcoder import QKTranscoder, empty_qk_transcoder
from tests.qkmodel.layers import random_layer

CONTEXT, QUERY_FEATURES, KEY_FEATURES = 7, 6, 5

# what the families differ in: grouping, rotary of all, of part, of none or interleaved, q/k norm, soft-cap, window
LAYERS = {
    "grouped": {},
    "gpt2": {"n_kv_heads": 4, "rotary_dim": 0},
    "pythia": {"n_kv_heads": 4, "rotary_dim": 8},
    "glm": {"rotary_dim": 8, "rotary_interleaved": True},
    "mistral": {"window": 3},
    "qwen3": {"qk_norm_eps": 1e-6},
    "gemma2": {"soft_cap": 2.0, "window": 4},
    "yarn": {"rotary_scaling": 1.3},
}
HYPERPARAMETERS = {
    "topk": {"activation": "topk", "k": 3},
    "relu": {"activation": "relu", "penalty": "l1", "sparsity_coefficient": 0.1},
}


def random_dictionary(family: str, activation: str = "topk") -> tuple[QKTranscoder, AttentionLayer, Tensor]:
    """A transcoder and a layer of random numbers in float64, and attention inputs [2, context, d_model]."""
    layer = random_layer(**LAYERS[family])
    settings = Hyperparameters(
        dictionary_size=QUERY_FEATURES,
        key_dictionary_size=KEY_FEATURES,
        learning_rate=1e-3,
        **HYPERPARAMETERS[activation],
    )
    transcoder = empty_qk_transcoder(settings, layer)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    x = torch.randn(2, CONTEXT, layer.geometry.d_model, generator=generator, dtype=torch.float64)
    return transcoder.double().requires_grad_(False), layer.double(), x


def contributions(
    transcoder: QKTranscoder, layer: AttentionLayer, x: Float[Tensor, "context d_model"]
) -> Float[Tensor, "n_heads context context query_features key_features"]:
    """What each pair adds to each score before the soft-cap, visible or not."""
    rows = []
    for side, f in ((transcoder.query, transcoder.query.encode(x)), (transcoder.key, transcoder.key.encode(x))):
        everywhere = side.W_dec.unflatten(-1, (-1, layer.geometry.d_head))[:, None].expand(-1, len(x), -1, -1)
        rows.append(layer.rotate(everywhere) * f.mT[:, :, None, None])
    group = layer.geometry.n_heads // layer.geometry.n_kv_heads
    keys = rows[1].repeat_interleave(group, 2)
    return torch.einsum("aihd,bjhd->hijab", rows[0], keys) * layer.geometry.scale


def scores(
    transcoder: QKTranscoder,
    layer: AttentionLayer,
    x: Float[Tensor, "context d_model"],
    mask: Float[Tensor, "n_heads query_features key_features"],
) -> Float[Tensor, "n_heads context context"]:
    """Scores with each pair times its mask; −inf where a key is not visible."""
    d_head, group = layer.geometry.d_head, layer.geometry.n_heads // layer.geometry.n_kv_heads
    q_hat, k_hat = (y.unflatten(-1, (-1, d_head))[None] for y in transcoder(x))
    b_q, b_k = (
        side.b_out.view(1, 1, -1, d_head).expand(1, len(x), -1, -1) for side in (transcoder.query, transcoder.key)
    )

    def product(q: Tensor, k: Tensor) -> Tensor:
        keys = layer.rotate(k).repeat_interleave(group, 2)
        return torch.einsum("xihd,xjhd->hij", layer.rotate(q), keys) * layer.geometry.scale

    raw = product(b_q, k_hat) + product(q_hat - b_q, b_k)
    raw = raw + torch.einsum("hijab,hab->hij", contributions(transcoder, layer, x), mask)
    if layer.geometry.soft_cap is not None:
        raw = layer.geometry.soft_cap * torch.tanh(raw / layer.geometry.soft_cap)
    return raw.masked_fill(~layer.visible(len(x)), float("-inf"))
