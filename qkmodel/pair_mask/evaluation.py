"""Every metric of a pair mask, measured on held-out sequences after the choice of pairs was made."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qkmodel.attention import AttentionLayer
from qkmodel.pair_mask.masked_scores import masked_scores, masked_sums
from qkmodel.pair_mask.pair_set import PairSet
from qkmodel.pair_mask.score_terms import SequenceCodes, final_scores, score_terms, sequence_codes
from qkmodel.pair_mask.shares import PairShares, ShareSums
from qkmodel.pattern_kl import row_kl
from qkmodel.transcoder import QKTranscoder

VARIANCE_SHARE = 0.9


@torch.no_grad()
def mask_kl(
    transcoder: QKTranscoder,
    layer: AttentionLayer,
    codes: Iterable[SequenceCodes],
    kept: PairSet,
    pool: ThreadPoolExecutor,
) -> float:
    """KL(p ‖ p̂) in nats with the kept pairs and the bias terms alone, mean over heads and rows."""
    mask, kl = np.ones(len(kept), np.float32), _MeanKL()
    for one in codes:
        kl.add(one, masked_scores(transcoder, layer, one, kept, mask, pool))
    return kl.value


@torch.no_grad()
def unmasked_kl(transcoder: QKTranscoder, layer: AttentionLayer, codes: Iterable[SequenceCodes]) -> float:
    """KL(p ‖ p̂) in nats with all pairs and the bias terms, mean over heads and rows."""
    kl = _MeanKL()
    for one in codes:
        kl.add(one, final_scores(score_terms(transcoder, layer, one).scores, layer))
    return kl.value


@torch.no_grad()
def evaluate_mask(
    transcoder: QKTranscoder,
    layer: AttentionLayer,
    codes: Iterable[SequenceCodes],
    kept: PairSet,
    salient_pairs: int,
    pool: ThreadPoolExecutor,
    kl_unmasked: float | None = None,
) -> tuple[dict[str, float | None], PairShares]:
    """Metrics of a mask, and the shares of its pairs, on held-out sequences, which are gone through once.

    Where a dictionary was trained along, its pairs that are not kept mean nothing, so `kl_unmasked` is given, that of
    the dictionary it comes from with all pairs, and shares are those of the masked score; else of the score of all.

    `kl_masked`; `kl`, of all pairs, and `kl_no_pairs`, of the bias terms alone, of the same transcoders; `kl_unmasked`;
    `mask_recovered` = (kl_no_pairs − kl_masked)/(kl_no_pairs − kl_unmasked), None where that is nothing; `pairs_kept`,
    its share of all pairs and of the `salient_pairs` of the calibration sequences, see `SalientPairs.salient`;
    `pairs_head_00`…; `unpaired_query` and `unpaired_key`, shares of features without a pair in any head;
    `pairs_for_90` of the kept, see `PairShares.pairs_for`; `variance_share` and `bias_share`, what of the heads' score
    variance the kept pairs and the bias terms make up, mean over heads.
    """
    heads, queries, keys = kept.shape
    masked, without, whole = _MeanKL(), _MeanKL(), _MeanKL()
    mask, sums = np.ones(len(kept), np.float32), ShareSums(layer, kept)
    for one in codes:
        terms = score_terms(transcoder, layer, one)
        of_kept = masked_sums(terms, layer, one, kept, mask, pool)
        masked.add(one, final_scores(of_kept, layer))
        without.add(one, final_scores(terms.bias_scores, layer))
        whole.add(one, final_scores(terms.scores, layer))
        sums.add(terms, terms.scores if kl_unmasked is None else of_kept, one, pool)
    shares = sums.shares()
    few = shares.pairs_for(VARIANCE_SHARE)
    unmasked = whole.value if kl_unmasked is None else kl_unmasked
    spread = without.value - unmasked
    paired = kept.pairs_of_rows.reshape(heads, queries).any(0).sum()
    metrics = {
        "kl": whole.value,
        "kl_masked": masked.value,
        "kl_no_pairs": without.value,
        "kl_unmasked": unmasked,
        "mask_recovered": (without.value - masked.value) / spread if spread else None,
        "pairs_kept": float(len(kept)),
        "pairs_share": len(kept) / (heads * queries * keys),
        "pairs_share_active": len(kept) / max(1, salient_pairs),
        "unpaired_query": 1 - float(paired) / queries,
        "unpaired_key": 1 - len(np.unique(kept.key_features)) / keys,
        "pairs_for_90": None if few is None else float(few),
        "variance_share": float(shares.variance_share.sum()) / heads,
        "bias_share": float(shares.bias_share.mean()),
    }
    return metrics | {f"pairs_head_{head:02d}": float(n) for head, n in enumerate(kept.pairs_of_heads)}, shares


@torch.no_grad()
def masked_pattern(
    transcoder: QKTranscoder,
    layer: AttentionLayer,
    kept: PairSet,
    pool: ThreadPoolExecutor,
    x: Float[Tensor, "batch context d_model"],
) -> Float[Tensor, "batch n_heads context context"]:
    """The pattern that the kept pairs and the bias terms make of `x`."""
    mask = np.ones(len(kept), np.float32)
    codes = sequence_codes(transcoder, layer, x)
    return torch.stack([masked_scores(transcoder, layer, one, kept, mask, pool).softmax(-1) for one in codes])


class _MeanKL:
    """KL(p ‖ p̂) over the rows of all heads and sequences, in float64."""

    def __init__(self) -> None:
        self._total, self._rows = 0.0, 0

    def add(self, codes: SequenceCodes, scores: Float[Tensor, "n_heads context context"]) -> None:
        kl = row_kl(codes.log_p, scores.log_softmax(-1)).double()
        self._total += kl.sum().item()
        self._rows += kl.numel()

    @property
    def value(self) -> float:
        return self._total / self._rows
