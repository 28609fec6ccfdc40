"""Reads one layer's query and key path out of a language model, and proves it against the model's own pattern."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qkmodel.attention import AttentionGeometry, AttentionLayer
from qkmodel.errors import InputError

if TYPE_CHECKING:
    # takes seconds to import, and this module only looks at a model it is given
    from qkmodel.language_model import LanguageModel

PATTERN_TOLERANCE = 1e-5

# transformer_lens' classes by exact name: their subclasses and siblings add ALiBi, relative bias, latents …
_LEARNED_POSITIONS = frozenset({"JointQKVAttentionBridge"})
_ROTARY = frozenset({"JointQKVPositionEmbeddingsAttentionBridge", "PositionEmbeddingsAttentionBridge"})


def extract_attention_layer(model: "LanguageModel", layer: int, tokens: Int[Tensor, "batch context"]) -> AttentionLayer:
    """Copy `layer`'s query and key path out of `model` and prove it on `tokens`.

    The proof covers the contexts up to that of `tokens`: hand over sequences as long as those to be explained.

    Raises:
        InputError: the model has no such layer, or its attention is of a kind that is not reproduced.
    """
    if not 0 <= layer < model.description.n_layers:
        raise InputError(
            f"layers: {model.description.name} has no layer {layer}; its layers are 0 to "
            f"{model.description.n_layers - 1}"
        )
    _refuse_unsupported(model, layer)
    attention = AttentionLayer.from_tensors(_geometry(model, layer), _tensors(model, layer))
    hooks = f"blocks.{layer}.attn.hook_in", f"blocks.{layer}.attn.hook_pattern"
    captured = model.capture(tokens, hooks)
    check_pattern(attention.to(model.device), *(captured[hook] for hook in hooks))
    return attention


@torch.no_grad()
def check_pattern(
    attention: AttentionLayer,
    x: Float[Tensor, "batch context d_model"],
    pattern: Float[Tensor, "batch n_heads context context"],
) -> None:
    """Compare the pattern that `attention` makes of `x` with the model's own.

    Raises:
        InputError: they differ by more than PATTERN_TOLERANCE anywhere, the difference is not a number, or the
            number of heads is another.
    """
    where = f"{attention.geometry.architecture} layer {attention.geometry.layer}: its attention is not supported"
    if attention.geometry.n_heads != pattern.shape[1]:
        raise InputError(f"{where}; it has {pattern.shape[1]} heads, {attention.geometry.n_heads} were read")
    difference = (attention.pattern(*attention.project(x)) - pattern).abs().max().item()
    if not difference <= PATTERN_TOLERANCE:
        raise InputError(
            f"{where}; the reconstructed pattern differs from the model's by {difference:.1e}, "
            f"at most {PATTERN_TOLERANCE:.0e} is accepted"
        )


def _refuse_unsupported(model: "LanguageModel", layer: int) -> None:
    """Name what this module does not reproduce before any arithmetic does it less clearly."""
    attention = getattr(model.bridge.blocks[layer], "attn", None)
    cfg = model.bridge.cfg
    if attention is None:
        raise _unsupported(model, layer, "the layer has no attention")
    if type(attention).__name__ not in _LEARNED_POSITIONS | _ROTARY:
        raise _unsupported(model, layer, f"attention of kind {type(attention).__name__}")
    hf_attention = attention.original_component
    found = {
        "attention that is not causal": not attention.is_causal or attention.is_cross_attention,
        "a window of one token, which leaves nothing to attend to,": _window(model, layer) == 1,
        "attention sinks": getattr(hf_attention, "sinks", None) is not None,
        "scaled keys": getattr(hf_attention, "key_multiplier", None) is not None,
        "clipped queries and keys": getattr(getattr(hf_attention, "config", None), "clip_qkv", None) is not None,
        "gated queries": bool(getattr(cfg, "gated_q_proj", False)),
        "q/k norm after rotary": bool(getattr(cfg, "qk_norm_after_rope", False)),
        "quantised projections": not all(
            isinstance(projection.original_component, nn.Linear) for projection in (attention.q, attention.k)
        ),
    }
    for what, present in found.items():
        if present:
            raise _unsupported(model, layer, what)


def _unsupported(model: "LanguageModel", layer: int, what: str) -> InputError:
    return InputError(f"{model.architecture} layer {layer}: {what} is not supported")


def _geometry(model: "LanguageModel", layer: int) -> AttentionGeometry:
    attention, cfg = model.bridge.blocks[layer].attn, model.bridge.cfg
    hf_attention = attention.original_component
    d_head = cfg.d_head
    rotary: dict[str, object] = {}
    if type(attention).__name__ in _ROTARY:
        inv_freq, scaling = _rotary_frequencies(model, layer)
        rotary = {
            "rotary_dim": 2 * len(inv_freq),
            "rotary_interleaved": bool(
                getattr(cfg, "rotary_adjacent_pairs", False) or getattr(cfg, "rotary_interleaved_cos_sin", False)
            ),
            "rotary_scaling": scaling,
        }
    return AttentionGeometry(
        architecture=model.architecture,
        layer=layer,
        d_model=cfg.d_model,
        n_heads=attention.q.original_component.out_features // d_head,
        n_kv_heads=attention.k.original_component.out_features // d_head,
        d_head=d_head,
        scale=getattr(hf_attention, "scaling", d_head**-0.5),
        qk_norm_eps=_qk_norm_eps(model, layer),
        soft_cap=getattr(hf_attention, "attn_logit_softcapping", None),
        window=_window(model, layer),
        **rotary,
    )


def _tensors(model: "LanguageModel", layer: int) -> dict[str, Tensor]:
    attention = model.bridge.blocks[layer].attn
    tensors = {}
    for side in ("q", "k"):
        projection = getattr(attention, side).original_component
        tensors[f"w_{side}"] = projection.weight
        tensors[f"b_{side}"] = (
            projection.weight.new_zeros(projection.out_features) if projection.bias is None else projection.bias
        )
    if "q_norm" in attention.submodules:
        # Gemma stores its norm weights as a difference from one
        offset = 1.0 if model.bridge.cfg.rmsnorm_uses_offset else 0.0
        for side in ("q", "k"):
            tensors[f"{side}_norm"] = getattr(attention, f"{side}_norm").original_component.weight + offset
    if type(attention).__name__ in _ROTARY:
        tensors["inv_freq"], _ = _rotary_frequencies(model, layer)
    return tensors


def _rotary_frequencies(model: "LanguageModel", layer: int) -> tuple[Float[Tensor, " pairs"], float]:
    """Inverse frequencies and the factor on cosine and sine, as the model itself scaled them.

    Models with one rotary embedding per kind of layer (Gemma 3) prefix both with the layer's type.
    """
    rotary = model.bridge.rotary_emb.original_component
    layer_type = _layer_type(model, layer)
    prefix = f"{layer_type}_" if hasattr(rotary, f"{layer_type}_inv_freq") else ""
    rope_type = rotary.rope_type[layer_type] if isinstance(rotary.rope_type, dict) else rotary.rope_type
    if rope_type in ("dynamic", "longrope"):
        raise _unsupported(model, layer, f"rotary scaling {rope_type}, which depends on the context length,")
    return getattr(rotary, f"{prefix}inv_freq"), float(getattr(rotary, f"{prefix}attention_scaling"))


def _qk_norm_eps(model: "LanguageModel", layer: int) -> float | None:
    attention = model.bridge.blocks[layer].attn
    if "q_norm" not in attention.submodules:
        return None
    norm = attention.q_norm.original_component
    if isinstance(norm, nn.LayerNorm) or tuple(norm.weight.shape) != (model.bridge.cfg.d_head,):
        raise _unsupported(model, layer, "a q/k norm that is not one RMS norm shared by all heads")
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def _window(model: "LanguageModel", layer: int) -> int | None:
    """Width of the sliding window, None for full attention."""
    hf_attention = model.bridge.blocks[layer].attn.original_component
    if hasattr(hf_attention, "sliding_window"):
        return hf_attention.sliding_window
    # Mistral's layers do not know their window; its mask is built from the model's configuration
    if _layer_type(model, layer) in (None, "sliding_attention"):
        return getattr(model.bridge.original_model.config, "sliding_window", None)
    return None


def _layer_type(model: "LanguageModel", layer: int) -> str | None:
    layer_types = getattr(model.bridge.original_model.config, "layer_types", None)
    return None if layer_types is None else layer_types[layer]
