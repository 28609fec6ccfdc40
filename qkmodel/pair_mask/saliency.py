"""Which pairs matter: the second-order effect of taking each away from its scores.

For a row with true pattern p, taking c[j] away from its scores changes KL(p ‖ p̂) by ½·Var_p(c) to second order where
p̂ is close to p: softmax does not see what is constant along a row. Behind a soft-cap c counts times its slope at the
true score. Summed over the rows of a calibration set and divided by heads · rows, a pair's saliency is in nats of the
layer's `kl`.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float32, Int64

from qkmodel.attention import AttentionLayer
from qkmodel.kernels import pair_mask_cpu
from qkmodel.kernels.numerics_cpu import as_array
from qkmodel.pair_mask.masked_scores import each_head
from qkmodel.pair_mask.pair_set import PairSet
from qkmodel.pair_mask.score_terms import ActiveFeatures, SequenceCodes, first_visible, score_terms
from qkmodel.transcoder import QKTranscoder

# Sums are made for as many query features at a time as this holds, with all heads and key features.
BLOCK_BYTES = 512 * 2**20
SLICE = 2**20


@dataclass(frozen=True)
class SalientPairs:
    """The pairs of largest saliency (nats), and how many pairs had any at all.

    That are those ever active together where they can see each other, less the few that moved nothing there: a row of
    one key, a contribution that is the same on all of a row.
    """

    pairs: PairSet
    saliency: Float32[np.ndarray, "pairs"]
    salient: int

    def first(self, count: int) -> PairSet:
        """The `count` most salient."""
        chosen = np.zeros(len(self.pairs), bool)
        chosen[np.argsort(-self.saliency, kind="stable")[:count]] = True
        return self.pairs.subset(chosen)


def passes(transcoder: QKTranscoder, layer: AttentionLayer) -> int:
    """How many times `salient_pairs` goes through its sequences."""
    return -(-transcoder.query.features // _block(transcoder, layer))


def _block(transcoder: QKTranscoder, layer: AttentionLayer) -> int:
    """Query features whose sums are made at a time."""
    of_one_feature = 4 * layer.geometry.n_heads * transcoder.key.features
    return min(transcoder.query.features, max(1, BLOCK_BYTES // of_one_feature))


@torch.no_grad()
def salient_pairs(
    transcoder: QKTranscoder, layer: AttentionLayer, codes: Iterable[SequenceCodes], most: int, threads: int = 1
) -> SalientPairs:
    """The `most` pairs of largest saliency on these sequences; fewer where fewer are ever active.

    Exact for any dictionary size. `codes` are gone through once per block of query features, so what makes them anew
    each time need not keep them. Memory: BLOCK_BYTES (or one query feature's sums, where these are more), and some 60
    bytes for each of `most` pairs. The result does not depend on `threads`.
    """
    shape = heads, queries, keys = layer.geometry.n_heads, transcoder.query.features, transcoder.key.features
    rows = 0
    block = _block(transcoder, layer)
    sums = np.empty((heads, block, keys), np.float32)
    best, salient = _Largest(most), 0
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for first in range(0, queries, block):
            found = sums[:, : min(block, queries - first)]
            found[:] = 0
            for one in codes:
                _add_saliency(transcoder, layer, one, first, found, pool)
                rows += one.context if first == 0 else 0
            salient += np.count_nonzero(found)
            for head in range(heads):
                best.add((head * queries + first) * keys, found[head].ravel())
    numbers, saliency = best.take()
    return SalientPairs(PairSet.from_numbers(numbers, shape), saliency / np.float32(rows * heads), salient)


def _add_saliency(
    transcoder: QKTranscoder,
    layer: AttentionLayer,
    codes: SequenceCodes,
    first: int,
    sums: Float32[np.ndarray, "n_heads block key_features"],
    pool: ThreadPoolExecutor,
) -> None:
    codes = replace(codes, query=_between(codes.query, first, first + sums.shape[1]))
    terms = score_terms(transcoder, layer, codes)
    p, visible = codes.log_p.exp(), first_visible(layer, codes.context)

    def add(head: int, key_head: int) -> None:
        u, v = as_array(terms.u[head]), as_array(terms.v[key_head])
        pair_mask_cpu.add_saliency(
            *codes.slots, u, v, as_array(p[head]), as_array(codes.soft_cap_slope[head]), visible, first, sums[head]
        )

    each_head(layer, pool, add)


def _between(active: ActiveFeatures, first: int, end: int) -> ActiveFeatures:
    """What of it belongs to the features from `first` to before `end`."""
    kept = (active.features >= first) & (active.features < end)
    starts = np.concatenate([[0], np.cumsum(kept)])[active.starts]
    values = active.values[torch.from_numpy(kept)]
    return ActiveFeatures(starts, active.positions[kept], active.features[kept], values)


class _Largest:
    """The largest of many numbers that come block by block, and where they stood; zeros are none."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._found = [(np.empty(0, np.int64), np.empty(0, np.float32))]
        self._count = 0
        self._least = np.float32(0)

    def add(self, first_number: int, values: Float32[np.ndarray, "block"]) -> None:
        # in slices, since places take twice the memory of what they are found in
        for begin in range(0, len(values), SLICE):
            (places,) = np.nonzero(values[begin : begin + SLICE] > self._least)
            self._found.append((first_number + begin + places, values[begin + places]))
            self._count += len(places)
            # at twice as many, so that each is looked at a few times only, however many slices there are
            if self._count > 2 * self._most:
                self._reduce()

    def _reduce(self) -> None:
        numbers, values = (np.concatenate(parts) for parts in zip(*self._found, strict=True))
        order = np.argsort(numbers)
        numbers, values = numbers[order], values[order]
        if len(values) > self._most:
            self._least = np.partition(values, -self._most)[-self._most]
            chosen = values > self._least
            # of equal ones the first stay
            chosen[np.flatnonzero(values == self._least)[: self._most - chosen.sum()]] = True
            numbers, values = numbers[chosen], values[chosen]
        self._found, self._count = [(numbers, values)], len(values)

    def take(self) -> tuple[Int64[np.ndarray, "pairs"], Float32[np.ndarray, "pairs"]]:
        """Numbers, ascending, and their values."""
        self._reduce()
        return self._found[0]
