"""The comparison of patterns in tensor operations of any device, a few sequences at a time.

What GPUs use, of which nothing is asked before all are compared; and what the CPU's form is tested against.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from qkmodel.attention import AttentionLayer
from qkmodel.kernels.pattern_comparison_sums import FIRST_NO_BOS_ROW, RowSums
from qkmodel.kernels.pattern_kl_terms import Keys, Queries
from qkmodel.pattern_kl import row_kl

# Scores compared at a time, some twenty numbers for each: of shorter sequences more than one.
_SCORES = 2**22


def compared_sequences(n_heads: int, context: int) -> int:
    """How many sequences' scores are in memory at a time."""
    return max(1, _SCORES // (n_heads * context**2))


@torch.no_grad()
def add_rows(
    q_hat: Queries, k_hat: Keys, layer: AttentionLayer, x: Float[Tensor, "batch context d_model"], sums: RowSums
) -> None:
    """Compares the patterns of reconstructed queries and keys (before rotary) with the layer's own on `x`."""
    size = compared_sequences(layer.geometry.n_heads, x.shape[1])
    parts = zip(*(tensor.split(size) for tensor in (q_hat, k_hat, x)), strict=True)
    found = [_row_sums(*part, layer) for part in parts]
    kl, kl_no_bos, top1_and_error = (torch.stack(one).sum(0).numpy(force=True) for one in zip(*found, strict=True))
    sums.kl += kl
    sums.kl_no_bos += kl_no_bos
    sums.top1_and_error += top1_and_error


def _row_sums(
    q_hat: Queries, k_hat: Keys, x: Float[Tensor, "batch context d_model"], layer: AttentionLayer
) -> tuple[Float64[Tensor, "3 n_heads"], Float64[Tensor, "3"], Float64[Tensor, "2"]]:
    """As `RowSums` has them."""
    q, k = layer.project(x)
    true = layer.scores(q, k)
    kl, kl_no_bos = [], []
    for queries, keys in ((q_hat, k_hat), (q_hat, k), (q, k_hat)):
        scores = layer.scores(queries, keys)
        kl.append(_kl(true, scores).double().sum((0, 2)))
        kl_no_bos.append(_kl(*(every[..., FIRST_NO_BOS_ROW:, 1:] for every in (true, scores))).double().sum())
        if len(kl) == 1:
            top1 = (true.argmax(-1) == scores.argmax(-1)).double().sum()
            error = (true.softmax(-1) - scores.softmax(-1)).abs().amax(-1).double().sum()
    return torch.stack(kl), torch.stack(kl_no_bos), torch.stack((top1, error))


def _kl(scores: Float[Tensor, "*rows columns"], scores_hat: Float[Tensor, "*rows columns"]) -> Float[Tensor, "*rows"]:
    return row_kl(scores.log_softmax(-1), scores_hat.log_softmax(-1))
