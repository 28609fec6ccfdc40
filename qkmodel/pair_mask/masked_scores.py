"""Scores with only some pairs in them, their KL to the true pattern, and its gradients."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from qkmodel.attention import AttentionLayer
from qkmodel.kernels import pair_mask_cpu
from qkmodel.kernels.numerics_cpu import as_array
from qkmodel.pair_mask.pair_set import PairSet
from qkmodel.pair_mask.score_terms import ScoreTerms, SequenceCodes, final_scores, first_visible, score_terms
from qkmodel.transcoder import QKTranscoder

Mask = Float32[np.ndarray, "pairs"]


def each_head(layer: AttentionLayer, pool: ThreadPoolExecutor, work: Callable[[int, int], float | None]) -> list:
    """`work` on each head and the key head that it reads, spread over threads; the answers in the order of heads."""
    heads = range(layer.geometry.n_heads)
    group = layer.geometry.n_heads // layer.geometry.n_kv_heads
    return list(pool.map(work, heads, [head // group for head in heads]))


@torch.no_grad()
def masked_scores(
    transcoder: QKTranscoder,
    layer: AttentionLayer,
    codes: SequenceCodes,
    pairs: PairSet,
    mask: Mask,
    pool: ThreadPoolExecutor,
) -> Float[Tensor, "n_heads context context"]:
    """One sequence's scores with each pair times its mask and all others left out; −inf where a key is not visible."""
    return final_scores(masked_sums(score_terms(transcoder, layer, codes), layer, codes, pairs, mask, pool), layer)


@torch.no_grad()
def masked_sums(
    terms: ScoreTerms,
    layer: AttentionLayer,
    codes: SequenceCodes,
    pairs: PairSet,
    mask: Mask,
    pool: ThreadPoolExecutor,
) -> Float[Tensor, "n_heads context context"]:
    """The same before soft-cap and visibility: keys that are not visible have their bias terms alone."""
    visible, scores = (
        first_visible(layer, codes.context),
        terms.bias_scores.clone(memory_format=torch.contiguous_format),
    )

    def add(head: int, key_head: int) -> None:
        u, v = as_array(terms.u[head]), as_array(terms.v[key_head])
        held = (pairs.starts[head], pairs.key_features, mask)
        pair_mask_cpu.add_pairs(*codes.slots, u, v, visible, held, as_array(scores[head]))

    each_head(layer, pool, add)
    return scores


@dataclass(frozen=True)
class MaskGradient:
    """KL(p ‖ p̂) of a batch, mean over heads and rows in nats, and its gradient with respect to the mask."""

    kl: float
    mask: Mask


def mask_gradient(
    transcoder: QKTranscoder,
    layer: AttentionLayer,
    batch: Sequence[SequenceCodes],
    pairs: PairSet,
    mask: Mask,
    pool: ThreadPoolExecutor,
    x: Float[Tensor, "sequences context d_model"] | None = None,
) -> MaskGradient:
    """The loss of a mask on a batch of sequences.

    Where the transcoder's decoder rows and biases require gradients, theirs are added to `.grad`; with the batch's
    inputs `x` those of encoder rows and biases too, and what is active is what the transcoder says now. No result
    depends on how many threads `pool` has: they take different heads.
    """
    found, total = np.zeros_like(mask), 0.0
    rows = sum(one.context for one in batch) * layer.geometry.n_heads
    for number, given in enumerate(batch):
        codes = given if x is None else given.encoded_by(transcoder, x[number])
        terms = score_terms(transcoder, layer, codes)
        kl, gradients = _sequence_gradient(terms, layer, codes, pairs, mask, found, pool)
        total += kl
        if terms.u.requires_grad:
            values = (terms.u, terms.v, terms.bias_scores)
            torch.autograd.backward(values, [gradient / rows for gradient in gradients])
    return MaskGradient(total / rows, found / mask.dtype.type(rows))


def _sequence_gradient(
    terms: ScoreTerms,
    layer: AttentionLayer,
    codes: SequenceCodes,
    pairs: PairSet,
    mask: Mask,
    found: Mask,
    pool: ThreadPoolExecutor,
) -> tuple[float, tuple[Tensor, Tensor, Tensor]]:
    """KL summed over rows; adds the mask's gradient to `found` and returns those of `terms`."""
    heads, group = layer.geometry.n_heads, layer.geometry.n_heads // layer.geometry.n_kv_heads
    visible = first_visible(layer, codes.context)
    bias_scores = terms.bias_scores.detach().contiguous()
    soft_cap = bias_scores.numpy().dtype.type(layer.geometry.soft_cap or 0.0)
    of_scores = torch.zeros_like(bias_scores)
    joint = terms.u.requires_grad
    # keys that several heads read get a sum of their own from each: threads must not add to one
    of_u = terms.u.new_zeros(terms.u.shape if joint else (heads, 0, 0))
    of_v = terms.v.new_zeros((heads, *terms.v.shape[1:]) if joint else (heads, 0, 0))

    def add(head: int, key_head: int) -> float:
        return pair_mask_cpu.add_gradients(
            *codes.slots,
            as_array(terms.u[head]),
            as_array(terms.v[key_head]),
            visible,
            (pairs.starts[head], pairs.key_features, mask),
            (as_array(bias_scores[head]), as_array(codes.log_p[head])),
            soft_cap,
            (found, *(as_array(of[head]) for of in (of_scores, of_u, of_v))),
        )

    total = sum(each_head(layer, pool, add))
    return total, (of_u, of_v.unflatten(0, (-1, group)).sum(1), of_scores)
