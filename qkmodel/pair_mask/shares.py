"""How much of a head's scores each pair makes up.

Row-centred scores under the true pattern are what softmax sees of them: a row's variance is Var_p(s), and a pair's part
of it is Cov_p(contribution, s). Parts of all pairs and of the bias terms add up to the
whole. Scores are those before a soft-cap, where they are sums.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int64

from qkmodel.attention import AttentionLayer
from qkmodel.kernels import pair_mask_cpu
from qkmodel.kernels.numerics_cpu import as_array
from qkmodel.pair_mask.masked_scores import each_head
from qkmodel.pair_mask.pair_set import PairSet
from qkmodel.pair_mask.score_terms import SequenceCodes, first_visible, score_terms
from qkmodel.transcoder import QKTranscoder


@dataclass(frozen=True)
class PairShares:
    """Over the rows of some sequences: each pair's mean contribution where both features are active, how often that
    was, and its share of its head's score variance."""

    mean_contribution: Float64[np.ndarray, "pairs"]
    count: Int64[np.ndarray, "pairs"]
    variance_share: Float64[np.ndarray, "pairs"]

    def pairs_for(self, share: float) -> int:
        """How few of the pairs make up this share of what all of them together explain, mean over heads.

        Pairs work against each other too: the largest shares can come to more than all do.
        """
        wanted = share * self.variance_share.sum()
        reached = np.cumsum(np.sort(np.maximum(self.variance_share, 0))[::-1])
        return int(np.searchsorted(reached, wanted) + 1) if wanted > 0 else 0


@torch.no_grad()
def pair_shares(
    transcoder: QKTranscoder,
    layer: AttentionLayer,
    codes: Sequence[SequenceCodes],
    pairs: PairSet,
    pool: ThreadPoolExecutor,
) -> PairShares:
    """The shares of `pairs`, measured on these sequences (one at least)."""
    totals, weighted = np.zeros(len(pairs)), np.zeros(len(pairs))
    counts = np.zeros(len(pairs), np.int64)
    variances = torch.zeros(layer.geometry.n_heads, dtype=torch.float64)
    for one in codes:
        terms = score_terms(transcoder, layer, one)
        p = one.log_p.exp()
        scores = terms.scores
        weights = p * (scores - (p * scores).sum(-1, keepdim=True))
        variances += (weights * scores).sum((1, 2)).double()
        visible = first_visible(layer, one.context)

        def add(head: int, key_head: int, one=one, terms=terms, weights=weights, visible=visible) -> None:
            u, v, held = as_array(terms.u[head]), as_array(terms.v[key_head]), (pairs.starts[head], pairs.key_features)
            sums = (totals, counts, weighted)
            pair_mask_cpu.add_shares(*one.slots, u, v, visible, held, as_array(weights[head]), sums)

        each_head(layer, pool, add)
    of_head = np.repeat(variances.numpy(), pairs.pairs_of_heads)
    return PairShares(totals / np.maximum(counts, 1), counts, weighted / of_head)
