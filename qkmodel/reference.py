"""What every training of a layer is measured against: means, baselines and the cache's own error.

Computed once per layer from the model and the activation cache, and stored inside the cache's folder.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qkmodel.activations import DTYPES, ActivationCache
from qkmodel.attention import AttentionGeometry, AttentionLayer
from qkmodel.attention_extraction import extract_attention_layer
from qkmodel.configs import TrainingConfig
from qkmodel.data_order import sequences_per_epoch
from qkmodel.errors import InputError
from qkmodel.pattern_comparison import PatternComparison, evaluation_batch, patched_batches, validation_batches
from qkmodel.pattern_kl import row_kl
from qkmodel.schema import Schema
from qkmodel.tensor_file import UnknownFormat, read_tensor_file, write_tensor_file

if TYPE_CHECKING:
    # takes seconds to import, and readers of a stored reference need no model
    from qkmodel.language_model import LanguageModel

MEANS = ("mean_input", "mean_query", "mean_key")
# Sequences of the training split that means are taken over: more would not move them measurably.
MEAN_SEQUENCES = 256


@dataclass(frozen=True)
class LayerReference:
    """The figures a training of this layer is compared with.

    `mean_input` [d_model], `mean_query` [n_heads·d_head] and `mean_key` [n_kv_heads·d_head] are means over
    the training split, `input_rms` the root mean square of a coordinate of the input less its mean.
    `kl_baseline` (nats) is the KL of the pattern made from mean query and mean key;
    `kl_cache` the KL between the exact pattern and the one from cached activations: the floor below which a
    `kl` means nothing. `ce_clean` and `ce_ablated` (nats per token) are the model's cross-entropy with its own
    pattern and with the mean pattern; None when they were not asked for.
    """

    mean_input: Float[Tensor, "d_model"]
    mean_query: Float[Tensor, "query_width"]
    mean_key: Float[Tensor, "key_width"]
    input_rms: float
    kl_baseline: float
    kl_baseline_no_bos: float
    kl_cache: float
    ce_clean: float | None
    ce_ablated: float | None

    def figures(self) -> dict[str, float | None]:
        """The scalars alone, by name."""
        return {name: value for name, value in asdict(self).items() if not isinstance(value, Tensor)}


class ReferenceHeader(Schema):
    """What a stored reference holds beside its tensors."""

    format: Literal[2] = 2
    geometry: AttentionGeometry
    figures: dict[str, float | None]


def reference_path(cache: ActivationCache, layer: int, training: TrainingConfig) -> Path:
    """Where the reference of one layer lives; its name holds what its figures depend on."""
    means = min(MEAN_SEQUENCES, sequences_per_epoch(training, cache.context, cache.train_sequences_available))
    patched = f"c{training.patched_sequences}-{cache.manifest.key.products}"
    name = f"L{layer:02d}-m{means}-v{training.validation_sequences}-{patched}"
    return cache.folder / "reference" / f"{name}.safetensors"


def checked_sequences(context: int, validation_sequences: int) -> int:
    """On how many a layer's attention is proven, and exact activations are compared with cached ones."""
    return min(evaluation_batch(context), validation_sequences)


def ensure_reference(
    cache: ActivationCache, layer: int, training: TrainingConfig, load_model: "Callable[[], LanguageModel]"
) -> tuple[AttentionLayer, LayerReference]:
    """The layer and its reference, from disk or, where missing or damaged, computed from the model and stored.

    Raises InputError when the architecture's attention cannot be reproduced, and for a reference of an unknown
    format.
    """
    path = reference_path(cache, layer, training)
    try:
        return load_reference(path)
    except UnknownFormat:
        raise
    except (FileNotFoundError, InputError):
        # what is missing or damaged can be made again
        pass
    attention, reference = _compute(cache, layer, training, load_model())
    tensors = {f"attention.{name}": value for name, value in attention.to_tensors().items()}
    tensors |= {name: getattr(reference, name) for name in MEANS}
    path.parent.mkdir(exist_ok=True)
    write_tensor_file(path, ReferenceHeader(geometry=attention.geometry, figures=reference.figures()), tensors)
    return attention, reference


def load_reference(path: Path, device: torch.device | str = "cpu") -> tuple[AttentionLayer, LayerReference]:
    """Reads what `ensure_reference` stored. Raises as `read_tensor_file`."""
    header, tensors = read_tensor_file(path, ReferenceHeader)
    means = {name: tensors.pop(name).to(device) for name in MEANS}
    weights = {name.removeprefix("attention."): value.to(device) for name, value in tensors.items()}
    attention = AttentionLayer.from_tensors(header.geometry, weights)
    return attention, LayerReference(**means, **header.figures)


@torch.no_grad()
def _compute(
    cache: ActivationCache, layer: int, training: TrainingConfig, model: "LanguageModel"
) -> tuple[AttentionLayer, LayerReference]:
    checked = range(checked_sequences(cache.context, training.validation_sequences))
    tokens = cache.tokens("validation", list(checked))
    # what the cache holds is on the CPU, wherever the model is
    attention = extract_attention_layer(model, layer, tokens).cpu()
    mean_input, mean_query, mean_key, input_rms = _means(cache, attention, training)
    kl_baseline, kl_baseline_no_bos = _baselines(cache, attention, training.validation_sequences, mean_query, mean_key)
    exact = model.attention_inputs(tokens, [layer])[layer].cpu()
    cached = cache.read(layer, "validation", list(checked))
    log_p, log_p_cached = (attention.scores(*attention.project(x)).log_softmax(-1) for x in (exact, cached))
    ce_clean, ce_ablated = _cross_entropies(cache, attention, model, training.patched_sequences, mean_query, mean_key)
    kl_cache = row_kl(log_p, log_p_cached).double().mean().item()
    return attention, LayerReference(
        mean_input, mean_query, mean_key, input_rms, kl_baseline, kl_baseline_no_bos, kl_cache, ce_clean, ce_ablated
    )


def _means(
    cache: ActivationCache, attention: AttentionLayer, training: TrainingConfig
) -> tuple[Tensor, Tensor, Tensor, float]:
    sequences = min(MEAN_SEQUENCES, sequences_per_epoch(training, cache.context, cache.train_sequences_available))
    sums: list[Tensor | float] = [0.0, 0.0, 0.0, 0.0]
    size = evaluation_batch(cache.context)
    for start in range(0, sequences, size):
        x = cache.read(attention.geometry.layer, "train", list(range(start, min(start + size, sequences))))
        q, k = attention.project(x)
        for index, value in enumerate((x, q.flatten(-2), k.flatten(-2), x.square())):
            sums[index] = sums[index] + value.double().sum((0, 1))
    mean_input, mean_query, mean_key, mean_square = (total / (sequences * cache.context) for total in sums)
    input_rms = (mean_square - mean_input.square()).mean().sqrt().item()
    return mean_input.float(), mean_query.float(), mean_key.float(), input_rms


def _mean_queries_keys(
    attention: AttentionLayer, mean_query: Tensor, mean_key: Tensor, batch: int, context: int
) -> tuple[Float[Tensor, "batch context n_heads d_head"], Float[Tensor, "batch context n_kv_heads d_head"]]:
    d_head = attention.geometry.d_head
    return (
        mean_query.view(1, 1, -1, d_head).expand(batch, context, -1, -1),
        mean_key.view(1, 1, -1, d_head).expand(batch, context, -1, -1),
    )


def _baselines(
    cache: ActivationCache, attention: AttentionLayer, sequences: int, mean_query: Tensor, mean_key: Tensor
) -> tuple[float, float]:
    comparison = PatternComparison(attention.geometry.n_heads)
    for true in validation_batches(cache, attention, sequences):
        q, k = _mean_queries_keys(attention, mean_query, mean_key, true.x.shape[0], cache.context)
        comparison.add(true, q, k)
    return comparison.kl(), comparison.kl_no_bos()


def _cross_entropies(
    cache: ActivationCache,
    attention: AttentionLayer,
    model: "LanguageModel",
    sequences: int,
    mean_query: Tensor,
    mean_key: Tensor,
) -> tuple[float | None, float | None]:
    if sequences == 0:
        return None, None
    clean, ablated, count = 0.0, 0.0, 0
    for numbers in patched_batches(cache, attention, sequences):
        tokens = cache.tokens("validation", numbers)
        pattern = attention.pattern(
            *_mean_queries_keys(attention, mean_query, mean_key, tokens.shape[0], tokens.shape[1])
        )
        products = DTYPES[cache.manifest.key.products]
        batch_clean, batch_count = model.cross_entropy(tokens, products=products)
        batch_ablated, _ = model.cross_entropy(tokens, attention.geometry.layer, pattern, products)
        clean, ablated, count = clean + batch_clean, ablated + batch_ablated, count + batch_count
    return clean / count, ablated / count
