"""Every metric of a query/key transcoder, each defined in one place.

All figures are formed from sums pooled over the validation sequences, kept in float64. KL in nats. Feature
statistics leave position 0 (the BOS token) out. `…_no_bos` figures are defined in `pattern_comparison`.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qkmodel.activations import DTYPES, ActivationCache
from qkmodel.allocator import give_back_memory
from qkmodel.attention import AttentionLayer
from qkmodel.pattern_comparison import PatternComparison, TrueBatch, patched_batches, validation_batches
from qkmodel.reference import LayerReference
from qkmodel.transcode import infer
from qkmodel.transcoder import QKTranscoder

if TYPE_CHECKING:
    # takes seconds to import, and most metrics need no model
    from qkmodel.language_model import LanguageModel

# Attention inputs [batch, context, d_model] to a pattern [batch, n_heads, context, context].
PatternOf = Callable[[Tensor], Tensor]
# Shares of tokens: a feature that never fires is dead, one that fires on more than a tenth is dense.
DENSE_SHARE = 0.1
MINIMUM_CE_RANGE = 0.01


@torch.no_grad()
def evaluate(
    transcoders: Sequence[QKTranscoder],
    layer: AttentionLayer,
    cache: ActivationCache,
    reference: LayerReference,
    sequences: int,
    threads: int = 1,
) -> list[dict[str, float]]:
    """Metrics of each transcoder on the first `sequences` validation sequences.

    `kl`, `kl_head_00`…, `kl_query` (only queries reconstructed), `kl_key`, `kl_recovered`, their `_no_bos`
    forms, `top1`, `max_error`, `l0`, `l0_query`, `l0_key`, `dead_*`, `dense_*` (shares of features over
    `feature_window_tokens` tokens), and the layer's `kl_baseline` and `kl_cache` for reading beside them.
    """
    evaluations = [_Evaluation(transcoder, layer) for transcoder in transcoders]
    batches = validation_batches(cache, layer, sequences)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        following = pool.submit(next, batches, None)
        while (true := following.result()) is not None:
            # the next batch's true side is made beside this one's comparisons
            following = pool.submit(next, batches, None)
            for added in [pool.submit(one.add, true) for one in evaluations]:
                added.result()
    return [one.metrics(reference) for one in evaluations]


class _Evaluation:
    """One transcoder's pooled sums; feature statistics leave position 0 out."""

    def __init__(self, transcoder: QKTranscoder, layer: AttentionLayer) -> None:
        self._transcoder = transcoder
        self._d_head = layer.geometry.d_head
        self._comparison = PatternComparison(layer.geometry.n_heads)
        self._fired = {
            "query": np.zeros(transcoder.query.features, np.int64),
            "key": np.zeros(transcoder.key.features, np.int64),
        }
        self._tokens = 0

    def add(self, true: TrueBatch) -> None:
        q_hat, fired_query = infer(self._transcoder.query, true.x)
        k_hat, fired_key = infer(self._transcoder.key, true.x)
        self._comparison.add(true, *(heads.unflatten(-1, (-1, self._d_head)) for heads in (q_hat, k_hat)))
        self._fired["query"] += fired_query
        self._fired["key"] += fired_key
        self._tokens += true.x.shape[0] * (true.x.shape[1] - 1)

    def metrics(self, reference: LayerReference) -> dict[str, float]:
        metrics = _kl_metrics(self._comparison, reference)
        metrics |= {"top1": self._comparison.top1(), "max_error": self._comparison.max_error()}
        for side, fired in self._fired.items():
            metrics |= {
                # one division: rounding must not tell two trainings of equal l0 apart
                f"l0_{side}": float(fired.sum()) / self._tokens,
                f"dead_{side}": float((fired == 0).mean()),
                f"dense_{side}": float((fired / self._tokens > DENSE_SHARE).mean()),
            }
        metrics["l0"] = (metrics["l0_query"] + metrics["l0_key"]) / 2
        metrics["feature_window_tokens"] = self._tokens
        return metrics


@torch.no_grad()
def evaluate_cross_entropy(
    patterns: Sequence[PatternOf],
    layer: AttentionLayer,
    model: "LanguageModel",
    cache: ActivationCache,
    reference: LayerReference,
    sequences: int,
    threads: int = 1,
) -> list[dict[str, float | None]]:
    """What the model's next-token cross-entropy (nats) becomes with each of some patterns patched in.

    `ce_recovered` = (ce_ablated − ce_patched)/(ce_ablated − ce_clean), None where the denominator is under
    0.01 nats: then the layer's pattern hardly matters and the ratio is noise. The model multiplies in the cache's
    product type, as it did for `ce_clean` and `ce_ablated`.
    """
    # batches are gone, and their memory is wanted here
    give_back_memory()
    totals, count = [0.0] * len(patterns), 0
    for numbers in patched_batches(cache, layer, sequences):
        tokens = cache.tokens("validation", numbers)
        x = cache.read(layer.geometry.layer, "validation", numbers).to(layer.w_q.device)
        of_batch = [partial(pattern, x) for pattern in patterns]
        sums = model.cross_entropies(
            tokens, layer.geometry.layer, of_batch, DTYPES[cache.manifest.key.products], threads
        )
        totals = [total + nats for total, nats in zip(totals, sums, strict=True)]
        count += tokens[:, 1:].numel()
    return [_cross_entropy_metrics(total / count, reference) for total in totals]


@torch.no_grad()
def reconstructed_pattern(
    transcoder: QKTranscoder, layer: AttentionLayer, x: Float[Tensor, "batch context d_model"]
) -> Float[Tensor, "batch n_heads context context"]:
    """p̂(q̂,k̂): the pattern that both sides' reconstructions make of `x`."""
    return layer.pattern(*(heads.unflatten(-1, (-1, layer.geometry.d_head)) for heads in transcoder(x)))


def _cross_entropy_metrics(patched: float, reference: LayerReference) -> dict[str, float | None]:
    spread = reference.ce_ablated - reference.ce_clean
    return {
        "ce_clean": reference.ce_clean,
        "ce_ablated": reference.ce_ablated,
        "ce_patched": patched,
        "ce_recovered": (reference.ce_ablated - patched) / spread if spread >= MINIMUM_CE_RANGE else None,
    }


def _kl_metrics(comparison: PatternComparison, reference: LayerReference) -> dict[str, float]:
    return {
        "kl": comparison.kl(),
        "kl_query": comparison.kl("query"),
        "kl_key": comparison.kl("key"),
        "kl_baseline": reference.kl_baseline,
        "kl_recovered": 1 - comparison.kl() / reference.kl_baseline,
        "kl_no_bos": comparison.kl_no_bos(),
        "kl_query_no_bos": comparison.kl_no_bos("query"),
        "kl_key_no_bos": comparison.kl_no_bos("key"),
        "kl_baseline_no_bos": reference.kl_baseline_no_bos,
        "kl_recovered_no_bos": 1 - comparison.kl_no_bos() / reference.kl_baseline_no_bos,
        "kl_cache": reference.kl_cache,
    } | {f"kl_head_{head:02d}": kl for head, kl in enumerate(comparison.kl_of_heads())}
