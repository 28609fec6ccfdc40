"""Every metric of a pair mask, measured on held-out sequences after the choice of pairs was made."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from qkmodel.attention import AttentionLayer
from qkmodel.pair_mask.masked_scores import masked_scores
from qkmodel.pair_mask.pair_set import PairSet
from qkmodel.pair_mask.score_terms import SequenceCodes, final_scores, score_terms
from qkmodel.pair_mask.shares import PairShares, pair_shares
from qkmodel.pattern_kl import row_kl
from qkmodel.transcoder import QKTranscoder

VARIANCE_SHARE = 0.9


@torch.no_grad()
def mask_kl(
    transcoder: QKTranscoder,
    layer: AttentionLayer,
    codes: Sequence[SequenceCodes],
    kept: PairSet,
    pool: ThreadPoolExecutor,
) -> float:
    """KL(p ‖ p̂) in nats with the kept pairs and the bias terms alone, mean over heads and rows."""
    mask, total, rows = np.ones(len(kept), np.float32), 0.0, 0
    for one in codes:
        kl = row_kl(one.log_p, masked_scores(transcoder, layer, one, kept, mask, pool).log_softmax(-1)).double()
        total, rows = total + kl.sum().item(), rows + kl.numel()
    return total / rows


@torch.no_grad()
def evaluate_mask(
    transcoder: QKTranscoder,
    layer: AttentionLayer,
    codes: Sequence[SequenceCodes],
    kept: PairSet,
    salient_pairs: int,
    pool: ThreadPoolExecutor,
) -> tuple[dict[str, float], PairShares]:
    """Metrics of a mask, and the shares of its pairs, on held-out sequences.

    `kl_masked`; `kl`, of all pairs, and `kl_no_pairs`, of the bias terms alone, of the same decoders;
    `mask_recovered` = (kl_no_pairs − kl_masked)/(kl_no_pairs − kl); `pairs_kept`, its share of all pairs and of the
    `salient_pairs` of the calibration sequences, see `SalientPairs.salient`;
    `pairs_head_00`…; `unpaired_query` and `unpaired_key`, shares of features without a pair in any head;
    `pairs_for_90` of the kept, see `PairShares.pairs_for`, and `variance_share`, what of the heads' score variance the
    kept pairs make up, mean over heads.
    """
    heads, queries, keys = kept.shape
    nothing = kept.subset(np.zeros(len(kept), bool))
    masked = mask_kl(transcoder, layer, codes, kept, pool)
    without = mask_kl(transcoder, layer, codes, nothing, pool)
    whole = _unmasked_kl(transcoder, layer, codes)
    shares = pair_shares(transcoder, layer, codes, kept, pool)
    paired = kept.pairs_of_rows.reshape(heads, queries).any(0).sum()
    metrics = {
        "kl": whole,
        "kl_masked": masked,
        "kl_no_pairs": without,
        "mask_recovered": (without - masked) / (without - whole),
        "pairs_kept": float(len(kept)),
        "pairs_share": len(kept) / (heads * queries * keys),
        "pairs_share_active": len(kept) / max(1, salient_pairs),
        "unpaired_query": 1 - float(paired) / queries,
        "unpaired_key": 1 - len(np.unique(kept.key_features)) / keys,
        "pairs_for_90": float(shares.pairs_for(VARIANCE_SHARE)),
        "variance_share": float(shares.variance_share.sum()) / heads,
    }
    return metrics | {f"pairs_head_{head:02d}": float(n) for head, n in enumerate(kept.pairs_of_heads)}, shares


def _unmasked_kl(transcoder: QKTranscoder, layer: AttentionLayer, codes: Sequence[SequenceCodes]) -> float:
    total, rows = 0.0, 0
    for one in codes:
        scores = final_scores(score_terms(transcoder, layer, one).scores, layer)
        kl = row_kl(one.log_p, scores.log_softmax(-1)).double()
        total, rows = total + kl.sum().item(), rows + kl.numel()
    return total / rows
