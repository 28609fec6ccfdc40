"""Why one position of a text attends to another: the pairs of features that its score is the sum of."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from qkmodel.attention import AttentionLayer
from qkmodel.pair_mask.masked_scores import masked_sums
from qkmodel.pair_mask.pair_set import PairSet
from qkmodel.pair_mask.score_terms import ScoreTerms, SequenceCodes, final_scores, score_terms, sequence_codes
from qkmodel.transcoder import QKTranscoder, Transcoder


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
    transcoder, layer = _of_head(transcoder, layer, head)
    (codes,) = sequence_codes(transcoder, layer, x[None])
    terms = score_terms(transcoder, layer, codes)
    scores = terms.scores
    if kept is not None:
        kept = kept.of_head(head)
        with ThreadPoolExecutor(1) as pool:
            scores = masked_sums(terms, layer, codes, kept, np.ones(len(kept), np.float32), pool)
    p, p_hat = codes.log_p[0].exp(), final_scores(scores, layer)[0].softmax(-1)
    means = (p_hat * scores[0]).sum(-1)
    looks = []
    for query in range(len(p)):
        for key in p[query, : query + 1].topk(min(keys, query + 1)).indices.tolist():
            if p[query, key] == 0:
                continue
            largest, left_out = _largest_pairs(codes, terms, query, key, pairs, kept)
            score, bias = scores[0, query, key].item(), terms.bias_scores[0, query, key].item()
            looks.append(
                Attended(
                    query=query,
                    key=key,
                    p=p[query, key].item(),
                    p_hat=p_hat[query, key].item(),
                    score=score,
                    centred=score - means[query].item(),
                    bias=bias,
                    pairs=largest,
                    others=score - bias - sum(one.contribution for one in largest),
                    left_out=left_out,
                )
            )
    return HeadExplanation(head, p, p_hat, tuple(looks))


def _of_head(transcoder: QKTranscoder, layer: AttentionLayer, head: int) -> tuple[QKTranscoder, AttentionLayer]:
    """Both without the other heads, whose scores of a long text would take many times the memory."""
    d_head = layer.geometry.d_head
    key_head = head * layer.geometry.n_kv_heads // layer.geometry.n_heads
    rows, key_rows = (slice(one * d_head, (one + 1) * d_head) for one in (head, key_head))
    tensors = layer.to_tensors()
    for name, part in (("w_q", rows), ("b_q", rows), ("w_k", key_rows), ("b_k", key_rows)):
        tensors[name] = tensors[name][part]
    alone = AttentionLayer(layer.geometry.model_copy(update={"n_heads": 1, "n_kv_heads": 1}), tensors)
    sides = (_writing(transcoder.query, rows), _writing(transcoder.key, key_rows))
    return QKTranscoder(*sides), alone.to(layer.w_q.dtype)


def _writing(side: Transcoder, columns: slice) -> Transcoder:
    """The same features, of whose outputs only these columns are left."""
    part = Transcoder(side.features, side.b_pre, side.b_out[columns], side.activation)
    part.W_enc, part.b_enc = side.W_enc, side.b_enc
    part.W_dec = nn.Parameter(side.W_dec[:, columns])
    return part


def _largest_pairs(
    codes: SequenceCodes, terms: ScoreTerms, query: int, key: int, count: int, kept: PairSet | None
) -> tuple[tuple[Pair, ...], float]:
    """The active pairs of two positions that contribute most, of one head's codes and terms; what those that are not
    kept would add."""
    query_slots = slice(codes.query.starts[query], codes.query.starts[query + 1])
    (key_slots,) = (codes.key.positions == key).nonzero()
    products = terms.u[0, query_slots] @ terms.v[0, torch.from_numpy(key_slots)].mT
    contributions = products.double().numpy().ravel()
    queries = np.repeat(codes.query.features[query_slots], len(key_slots))
    features = np.tile(codes.key.features[key_slots], products.shape[0])
    counts = np.ones(len(contributions), bool) if kept is None else kept.has(0, queries, features)
    order = np.argsort(np.where(counts, -np.abs(contributions), np.inf), kind="stable")[: min(count, counts.sum())]
    largest = (Pair(int(queries[one]), int(features[one]), float(contributions[one])) for one in order)
    return tuple(largest), float(contributions[~counts].sum())
