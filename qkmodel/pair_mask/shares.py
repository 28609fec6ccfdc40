"""How much of a head's scores each pair makes up.

Row-centred scores under the true pattern are what softmax sees of them: a row's variance is Var_p(s), and a pair's part
of it is Cov_p(contribution, s). Parts of all pairs and of the bias terms add up to the whole. Scores are those before a
soft-cap, where they are sums.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from qkmodel.attention import AttentionLayer
from qkmodel.kernels import pair_mask_cpu
from qkmodel.kernels.numerics_cpu import as_array
from qkmodel.pair_mask.masked_scores import each_head
from qkmodel.pair_mask.pair_set import PairSet
from qkmodel.pair_mask.score_terms import ScoreTerms, SequenceCodes, first_visible


@dataclass(frozen=True)
class PairShares:
    """Over the rows of some sequences: each pair's mean contribution where both features are active, how often that
    was, and its share of its head's score variance; and what share of that the bias terms of each head have."""

    mean_contribution: Float64[np.ndarray, "pairs"]
    count: Int64[np.ndarray, "pairs"]
    variance_share: Float64[np.ndarray, "pairs"]
    bias_share: Float64[np.ndarray, "n_heads"]

    def pairs_for(self, share: float) -> int | None:
        """How few of the pairs make up this share of what all of them together explain, mean over heads.

        Pairs work against each other too: the largest shares can come to more than all do. They also work against the
        bias terms, and where together they explain nothing or less there is no such number: None.
        """
        wanted = share * self.variance_share.sum()
        if wanted <= 0:
            return None
        reached = np.cumsum(np.sort(np.maximum(self.variance_share, 0))[::-1])
        return int(np.searchsorted(reached, wanted) + 1)


class ShareSums:
    """Adds up over sequences what `PairShares` are formed from."""

    def __init__(self, layer: AttentionLayer, pairs: PairSet) -> None:
        self._layer = layer
        self._pairs = pairs
        self._totals, self._weighted = np.zeros(len(pairs)), np.zeros(len(pairs))
        self._counts = np.zeros(len(pairs), np.int64)
        self._variances = torch.zeros(layer.geometry.n_heads, dtype=torch.float64)
        self._of_biases = torch.zeros_like(self._variances)

    @torch.no_grad()
    def add(
        self,
        terms: ScoreTerms,
        scores: Float[Tensor, "n_heads context context"],
        codes: SequenceCodes,
        pool: ThreadPoolExecutor,
    ) -> None:
        """One more sequence, and those of its scores that pairs and bias terms have a part of."""
        p = codes.log_p.exp()
        weights = p * (scores - (p * scores).sum(-1, keepdim=True))
        self._variances += (weights * scores).sum((1, 2)).double()
        self._of_biases += (weights * terms.bias_scores).sum((1, 2)).double()
        visible, pairs = first_visible(self._layer, codes.context), self._pairs

        def add(head: int, key_head: int) -> None:
            u, v, held = as_array(terms.u[head]), as_array(terms.v[key_head]), (pairs.starts[head], pairs.key_features)
            sums = (self._totals, self._counts, self._weighted)
            pair_mask_cpu.add_shares(*codes.slots, u, v, visible, held, as_array(weights[head]), sums)

        each_head(self._layer, pool, add)

    def shares(self) -> PairShares:
        """Of what was added, one sequence at least; 0 in a head whose scores do not vary."""
        variances = self._variances.numpy()
        variances = np.where(variances > 0, variances, np.inf)
        return PairShares(
            self._totals / np.maximum(self._counts, 1),
            self._counts,
            self._weighted / np.repeat(variances, self._pairs.pairs_of_heads),
            self._of_biases.numpy() / variances,
        )
