"""Every metric of a query/key transcoder, each defined in one place.

All figures are formed from sums pooled over the validation sequences, kept in float64. KL in nats. Feature
statistics leave position 0 (the BOS token) out. `…_no_bos` figures are defined in `pattern_comparison`.
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from qkmodel.activations import ActivationCache
from qkmodel.attention import AttentionLayer
from qkmodel.pattern_comparison import (
    EVALUATION_BATCH,
    Keys,
    KLSums,
    Queries,
    log_patterns,
    validation_batches,
)
from qkmodel.reference import LayerReference
from qkmodel.transcoder import QKTranscoder, Transcoder

if TYPE_CHECKING:
    # takes seconds to import, and most metrics need no model
    from qkmodel.language_model import LanguageModel

# Shares of tokens: a feature that never fires is dead, one that fires on more than a tenth is dense.
DENSE_SHARE = 0.1
MINIMUM_CE_RANGE = 0.01


class FeatureCounts:
    """How often each feature of one side fires, position 0 left out."""

    def __init__(self, features: int) -> None:
        self.fired = torch.zeros(features, dtype=torch.float64)
        self.tokens = 0

    def add(self, f: Float[Tensor, "batch context features"]) -> None:
        active = f[:, 1:] > 0
        self.fired += active.sum((0, 1))
        self.tokens += active.shape[0] * active.shape[1]

    def metrics(self, side: str) -> dict[str, float]:
        share = self.fired / self.tokens
        return {
            # one division: rounding must not tell two trainings of equal l0 apart
            f"l0_{side}": (self.fired.sum() / self.tokens).item(),
            f"dead_{side}": (self.fired == 0).double().mean().item(),
            f"dense_{side}": (share > DENSE_SHARE).double().mean().item(),
        }


@torch.no_grad()
def evaluate(
    transcoder: QKTranscoder,
    layer: AttentionLayer,
    cache: ActivationCache,
    reference: LayerReference,
    sequences: int,
) -> dict[str, float]:
    """Metrics of a transcoder on the first `sequences` validation sequences.

    `kl`, `kl_head_00`…, `kl_query` (only queries reconstructed), `kl_key`, `kl_recovered`, their `_no_bos`
    forms, `top1`, `max_error`, `l0`, `l0_query`, `l0_key`, `dead_*`, `dense_*` (shares of features over
    `feature_window_tokens` tokens), and the layer's `kl_baseline` and `kl_cache` for reading beside them.
    """
    full, query_only, key_only = KLSums(), KLSums(), KLSums()
    counts = {"query": FeatureCounts(transcoder.query.features), "key": FeatureCounts(transcoder.key.features)}
    agreeing_rows, error_sum, rows = 0, 0.0, 0
    for true in validation_batches(cache, layer, sequences):
        q_hat, k_hat, f_query, f_key = _reconstruct(transcoder, layer, true.x)
        log_p_hat, log_p_hat_no_bos = log_patterns(layer, q_hat, k_hat)
        full.add(true, log_p_hat, log_p_hat_no_bos)
        query_only.add(true, *log_patterns(layer, q_hat, true.k))
        key_only.add(true, *log_patterns(layer, true.q, k_hat))
        counts["query"].add(f_query)
        counts["key"].add(f_key)
        agreeing_rows += (true.log_p.argmax(-1) == log_p_hat.argmax(-1)).sum().item()
        error_sum += (true.log_p.exp() - log_p_hat.exp()).abs().amax(-1).double().sum().item()
        rows += true.log_p[..., 0].numel()
    metrics = _kl_metrics(full, query_only, key_only, reference)
    metrics |= {"top1": agreeing_rows / rows, "max_error": error_sum / rows}
    metrics |= counts["query"].metrics("query") | counts["key"].metrics("key")
    metrics["l0"] = (metrics["l0_query"] + metrics["l0_key"]) / 2
    metrics["feature_window_tokens"] = counts["query"].tokens
    return metrics


@torch.no_grad()
def evaluate_briefly(
    transcoder: QKTranscoder, layer: AttentionLayer, cache: ActivationCache, reference: LayerReference, sequences: int
) -> dict[str, float]:
    """`kl`, `kl_recovered` and `l0` on the first `sequences` validation sequences: the progress of a training."""
    full = KLSums()
    query, key = FeatureCounts(transcoder.query.features), FeatureCounts(transcoder.key.features)
    for true in validation_batches(cache, layer, sequences):
        q_hat, k_hat, f_query, f_key = _reconstruct(transcoder, layer, true.x)
        full.add(true, *log_patterns(layer, q_hat, k_hat))
        query.add(f_query)
        key.add(f_key)
    l0 = (query.metrics("query")["l0_query"] + key.metrics("key")["l0_key"]) / 2
    return {"kl": full.mean(), "kl_recovered": 1 - full.mean() / reference.kl_baseline, "l0": l0}


@torch.no_grad()
def evaluate_cross_entropy(
    transcoder: QKTranscoder,
    layer: AttentionLayer,
    model: "LanguageModel",
    cache: ActivationCache,
    reference: LayerReference,
    sequences: int,
) -> dict[str, float | None]:
    """What the model's next-token cross-entropy (nats) becomes with the reconstructed pattern patched in.

    `ce_recovered` = (ce_ablated − ce_patched)/(ce_ablated − ce_clean), None where the denominator is under
    0.01 nats: then the layer's pattern hardly matters and the ratio is noise.
    """
    total, count = 0.0, 0
    for start in range(0, sequences, EVALUATION_BATCH):
        tokens = cache.tokens("validation", list(range(start, min(start + EVALUATION_BATCH, sequences))))
        x = model.attention_inputs(tokens, [layer.geometry.layer])[layer.geometry.layer]
        q_hat, k_hat, _, _ = _reconstruct(transcoder, layer, x)
        batch_sum, batch_count = model.cross_entropy(tokens, layer.geometry.layer, layer.pattern(q_hat, k_hat))
        total, count = total + batch_sum, count + batch_count
    patched = total / count
    spread = reference.ce_ablated - reference.ce_clean
    return {
        "ce_clean": reference.ce_clean,
        "ce_ablated": reference.ce_ablated,
        "ce_patched": patched,
        "ce_recovered": (reference.ce_ablated - patched) / spread if spread >= MINIMUM_CE_RANGE else None,
    }


def _kl_metrics(full: KLSums, query_only: KLSums, key_only: KLSums, reference: LayerReference) -> dict[str, float]:
    return {
        "kl": full.mean(),
        "kl_query": query_only.mean(),
        "kl_key": key_only.mean(),
        "kl_baseline": reference.kl_baseline,
        "kl_recovered": 1 - full.mean() / reference.kl_baseline,
        "kl_no_bos": full.mean_no_bos(),
        "kl_query_no_bos": query_only.mean_no_bos(),
        "kl_key_no_bos": key_only.mean_no_bos(),
        "kl_baseline_no_bos": reference.kl_baseline_no_bos,
        "kl_recovered_no_bos": 1 - full.mean_no_bos() / reference.kl_baseline_no_bos,
        "kl_cache": reference.kl_cache,
    } | {f"kl_head_{head:02d}": kl for head, kl in enumerate(full.heads())}


def _reconstruct(
    transcoder: QKTranscoder, layer: AttentionLayer, x: Float[Tensor, "batch context d_model"]
) -> tuple[Queries, Keys, Float[Tensor, "batch context features"], Float[Tensor, "batch context features"]]:
    def side(part: Transcoder, heads: int) -> tuple[Tensor, Tensor]:
        f = part.encode(x)
        return part.decode(f).unflatten(-1, (heads, layer.geometry.d_head)), f

    q_hat, f_query = side(transcoder.query, layer.geometry.n_heads)
    k_hat, f_key = side(transcoder.key, layer.geometry.n_kv_heads)
    return q_hat, k_hat, f_query, f_key
