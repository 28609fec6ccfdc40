"""The parts that a sequence's scores are the sum of: pairs of active features, and what a bias stands in."""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from qkmodel.attention import AttentionLayer
from qkmodel.transcoder import QKTranscoder, Transcoder


@dataclass(frozen=True)
class ActiveFeatures:
    """One side's active features on one sequence, in slots: the place, the feature and the activation of each.

    With `starts` by position, position i has the slots `starts[i]:starts[i + 1]`; by feature, feature n has them, with
    positions ascending. Queries are held by position, keys by feature: so loops over kept pairs meet nothing else.
    """

    starts: Int64[np.ndarray, "context+1"] | Int64[np.ndarray, "features+1"]
    positions: Int32[np.ndarray, "slots"]
    features: Int32[np.ndarray, "slots"]
    values: Float[Tensor, "slots"]


def by_position(f: Float[Tensor, "context features"]) -> ActiveFeatures:
    """What is active in `f`, in the order of positions."""
    position, feature = f.nonzero(as_tuple=True)
    return ActiveFeatures(_starts(position, len(f)), *_int32(position, feature), f[position, feature])


def by_feature(f: Float[Tensor, "context features"]) -> ActiveFeatures:
    """What is active in `f`, in the order of features."""
    feature, position = f.mT.nonzero(as_tuple=True)
    return ActiveFeatures(_starts(feature, f.shape[1]), *_int32(position, feature), f[position, feature])


def _starts(sorted_numbers: Tensor, end: int) -> Int64[np.ndarray, "end+1"]:
    return np.searchsorted(sorted_numbers.numpy(), np.arange(end + 1)).astype(np.int64)


def _int32(*numbers: Tensor) -> tuple[np.ndarray, ...]:
    return tuple(each.numpy().astype(np.int32) for each in numbers)


@dataclass(frozen=True)
class SequenceCodes:
    """The active features of one sequence on both sides, and the log of its true pattern.

    `soft_cap_slope` is how much a true score as softmax receives it moves with the one before the soft-cap; without
    soft-cap it is empty.
    """

    query: ActiveFeatures
    key: ActiveFeatures
    log_p: Float[Tensor, "n_heads context context"]
    soft_cap_slope: Float[Tensor, "n_heads context context"] | Float[Tensor, "n_heads 0 0"]

    @property
    def context(self) -> int:
        return self.log_p.shape[-1]

    @property
    def slots(self) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Both sides as the compiled loops take them."""
        return (self.query.starts, self.query.features), (self.key.starts, self.key.positions)

    def encoded_by(self, transcoder: QKTranscoder, x: Float[Tensor, "context d_model"]) -> Self:
        """The same sequence in the features of `transcoder`, differentiable in its encoders; `x` is its input."""
        query, key = _active(transcoder, x)
        return replace(self, query=query, key=key)


@torch.no_grad()
def sequence_codes(
    transcoder: QKTranscoder, layer: AttentionLayer, x: Float[Tensor, "sequences context d_model"]
) -> list[SequenceCodes]:
    """The codes of each sequence of a batch of attention inputs."""
    scores = layer.scores(*layer.project(x))
    return [
        SequenceCodes(*_active(transcoder, one), true.log_softmax(-1), _soft_cap_slope(true, layer))
        for one, true in zip(x, scores, strict=True)
    ]


def _active(transcoder: QKTranscoder, x: Float[Tensor, "context d_model"]) -> tuple[ActiveFeatures, ActiveFeatures]:
    return by_position(transcoder.query.encode(x)), by_feature(transcoder.key.encode(x))


def _soft_cap_slope(
    scores: Float[Tensor, "n_heads context context"], layer: AttentionLayer
) -> Float[Tensor, "n_heads context context"] | Float[Tensor, "n_heads 0 0"]:
    if layer.geometry.soft_cap is None:
        return scores.new_empty(len(scores), 0, 0)
    # the derivative of c·tanh(s/c) is 1 − tanh²(s/c)
    return 1 - (scores.masked_fill(scores == float("-inf"), 0.0) / layer.geometry.soft_cap).square()


@dataclass(frozen=True)
class ScoreTerms:
    """One sequence's scores before soft-cap and visibility: pairs of slots, and all else.

    The score of head h is `bias_scores[h]` plus, for every query slot a at i and key slot b at j,
    `u[h, a] · v[g(h), b]` where g(h) is the key head that h reads; `pair_scores` are the sums of these. Rotary and
    scale are in `u` and `v`.
    """

    u: Float[Tensor, "n_heads query_slots d_head"]
    v: Float[Tensor, "n_kv_heads key_slots d_head"]
    bias_scores: Float[Tensor, "n_heads context context"]
    pair_scores: Float[Tensor, "n_heads context context"]

    @property
    def scores(self) -> Float[Tensor, "n_heads context context"]:
        """What the dictionary as a whole gives."""
        return self.bias_scores + self.pair_scores


def score_terms(transcoder: QKTranscoder, layer: AttentionLayer, codes: SequenceCodes) -> ScoreTerms:
    """The terms of a sequence; differentiable in decoder rows and biases."""
    u, b_q = _rotated(transcoder.query, codes.query, codes.context, layer, layer.geometry.scale)
    v, b_k = _rotated(transcoder.key, codes.key, codes.context, layer, 1.0)
    f_q, f_k = _sum_of_slots(u, codes.query, codes.context), _sum_of_slots(v, codes.key, codes.context)
    group = layer.geometry.n_heads // layer.geometry.n_kv_heads
    f_k, b_k = (y.repeat_interleave(group, 0) for y in (f_k, b_k))
    return ScoreTerms(u, v, b_q @ (f_k + b_k).mT + f_q @ b_k.mT, f_q @ f_k.mT)


def final_scores(
    scores: Float[Tensor, "n_heads context context"], layer: AttentionLayer
) -> Float[Tensor, "n_heads context context"]:
    """Scores as softmax receives them: through the soft-cap, −inf where a key is not visible."""
    if layer.geometry.soft_cap is not None:
        scores = layer.geometry.soft_cap * torch.tanh(scores / layer.geometry.soft_cap)
    return scores.masked_fill(~layer.visible(scores.shape[-1]), float("-inf"))


def _rotated(
    transcoder: Transcoder, active: ActiveFeatures, context: int, layer: AttentionLayer, scale: float
) -> tuple[Float[Tensor, "heads slots d_head"], Float[Tensor, "heads context d_head"]]:
    """Each slot's decoder row times its activation, and the bias at each position: rotated and scaled."""
    d_head = layer.geometry.d_head
    # not by indexing, whose gradient is summed by several threads in any order
    rows = transcoder.W_dec.index_select(0, torch.from_numpy(active.features)) * (active.values * scale)[:, None]
    positions = torch.from_numpy(active.positions).long()
    slots = layer.rotate_at(rows.unflatten(-1, (-1, d_head)), positions, context)
    biases = (transcoder.b_out * scale).view(1, 1, -1, d_head).expand(1, context, -1, -1)
    return slots.transpose(0, 1).contiguous(), layer.rotate(biases)[0].transpose(0, 1)


def _sum_of_slots(
    rows: Float[Tensor, "heads slots d_head"], active: ActiveFeatures, context: int
) -> Float[Tensor, "heads context d_head"]:
    """The sum of each position's slots."""
    sums = rows.new_zeros(rows.shape[0], context, rows.shape[2])
    return sums.index_add(1, torch.from_numpy(active.positions).long(), rows)


def first_visible(layer: AttentionLayer, context: int) -> Int64[np.ndarray, "context"]:
    """The first key position that each query position sees."""
    positions = np.arange(context)
    return positions * 0 if layer.geometry.window is None else np.maximum(0, positions - layer.geometry.window + 1)
