"""Why one position of a text attends to another: the pairs of features that its score is the sum of."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qkmodel.attention import AttentionLayer
from qkmodel.pair_mask.masked_scores import masked_sums
from qkmodel.pair_mask.pair_set import PairSet
from qkmodel.pair_mask.score_terms import SequenceCodes, final_scores, score_terms, sequence_codes
from qkmodel.transcoder import QKTranscoder


@dataclass(frozen=True)
class Pair:
    """One active pair and what it adds to the score."""

    query_feature: int
    key_feature: int
    contribution: float

    @property
    def features(self) -> tuple[int, int]:
        return self.query_feature, self.key_feature


@dataclass(frozen=True)
class Attended:
    """One query position's look at one key position in one head.

    `score` (before soft-cap) = `bias` + the contributions of all active pairs, of which `pairs` are the largest in size
    and `others` is the sum of the rest. `centred` is the score less the row's mean under the reconstructed pattern:
    what softmax sees of it. `p` is the model's own probability, `p_hat` the reconstructed one. Where pairs are masked
    all this is of those that were kept, and `left_out` the sum of what the others would contribute.
    """

    query: int
    key: int
    p: float
    p_hat: float
    score: float
    centred: float
    bias: float
    pairs: tuple[Pair, ...]
    others: float
    left_out: float


@dataclass(frozen=True)
class HeadExplanation:
    """A head on one sequence: its true and reconstructed pattern [context, context], and the looks worth explaining."""

    head: int
    p: Float[Tensor, "context context"]
    p_hat: Float[Tensor, "context context"]
    looks: tuple[Attended, ...]


@torch.no_grad()
def explain_head(
    transcoder: QKTranscoder,
    layer: AttentionLayer,
    x: Float[Tensor, "context d_model"],
    head: int,
    keys: int = 2,
    pairs: int = 5,
    kept: PairSet | None = None,
) -> HeadExplanation:
    """For each query position the `keys` positions that the model attends to most in this head, and their pairs.

    `x` is the layer's attention input on one sequence, in float32; `kept` the pairs that a mask left (None: all).
    """
    (codes,) = sequence_codes(transcoder, layer, x[None])
    terms = score_terms(transcoder, layer, codes)
    scores = terms.scores
    if kept is not None:
        with ThreadPoolExecutor(1) as pool:
            scores = masked_sums(terms, layer, codes, kept, np.ones(len(kept), np.float32), pool)
    p, p_hat = codes.log_p[head].exp(), final_scores(scores, layer)[head].softmax(-1)
    key_head = head * layer.geometry.n_kv_heads // layer.geometry.n_heads
    means = (p_hat * scores[head]).sum(-1)
    looks = []
    for query in range(len(p)):
        for key in p[query, : query + 1].topk(min(keys, query + 1)).indices.tolist():
            if p[query, key] == 0:
                continue
            contributions = _contributions(codes, terms.u[head], terms.v[key_head], query, key)
            counting = [one for one in contributions if kept is None or kept.has(head, *one.features)]
            largest = sorted(counting, key=lambda one: -abs(one.contribution))[:pairs]
            score = scores[head, query, key].item()
            bias = terms.bias_scores[head, query, key].item()
            looks.append(
                Attended(
                    query=query,
                    key=key,
                    p=p[query, key].item(),
                    p_hat=p_hat[query, key].item(),
                    score=score,
                    centred=score - means[query].item(),
                    bias=bias,
                    pairs=tuple(largest),
                    others=score - bias - sum(one.contribution for one in largest),
                    left_out=sum(one.contribution for one in contributions) - sum(one.contribution for one in counting),
                )
            )
    return HeadExplanation(head, p, p_hat, tuple(looks))


def _contributions(
    codes: SequenceCodes,
    u: Float[Tensor, "query_slots d_head"],
    v: Float[Tensor, "key_slots d_head"],
    query: int,
    key: int,
) -> list[Pair]:
    """Every active pair of two positions."""
    query_slots = range(codes.query.starts[query], codes.query.starts[query + 1])
    key_slots = (codes.key.positions == key).nonzero()[0]
    products = u[query_slots.start : query_slots.stop] @ v[torch.from_numpy(key_slots)].mT
    return [
        Pair(int(codes.query.features[a]), int(codes.key.features[b]), products[row, column].item())
        for row, a in enumerate(query_slots)
        for column, b in enumerate(key_slots)
    ]
