"""The comparison of patterns in tensor operations of any device, one sequence at a time.

What GPUs use, where evaluation is a small part of a training; and what the CPU's form is tested against.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from qkmodel.attention import AttentionLayer
from qkmodel.kernels.pattern_comparison_sums import FIRST_NO_BOS_ROW, RowSums
from qkmodel.kernels.pattern_kl_terms import Keys, Queries
from qkmodel.pattern_kl import row_kl


@torch.no_grad()
def add_rows(
    q_hat: Queries, k_hat: Keys, layer: AttentionLayer, x: Float[Tensor, "batch context d_model"], sums: RowSums
) -> None:
    """Compares the patterns of reconstructed queries and keys (before rotary) with the layer's own on `x`.

    Memory: some twenty numbers for each score of a sequence.
    """
    for one in range(len(x)):
        sequence = slice(one, one + 1)
        q, k = layer.project(x[sequence])
        true = layer.scores(q, k)
        pairs = ((q_hat[sequence], k_hat[sequence]), (q_hat[sequence], k), (q, k_hat[sequence]))
        for term, (queries, keys) in enumerate(pairs):
            scores = layer.scores(queries, keys)
            sums.kl[term] += _kl(true, scores).sum((0, 2)).double().numpy(force=True)
            sums.kl_no_bos[term] += _kl(*(every[..., FIRST_NO_BOS_ROW:, 1:] for every in (true, scores))).sum().item()
            if term == 0:
                sums.top1_and_error[0] += (true.argmax(-1) == scores.argmax(-1)).sum().item()
                sums.top1_and_error[1] += (true.softmax(-1) - scores.softmax(-1)).abs().amax(-1).sum().item()


def _kl(scores: Float[Tensor, "*rows columns"], scores_hat: Float[Tensor, "*rows columns"]) -> Float[Tensor, "*rows"]:
    return row_kl(scores.log_softmax(-1), scores_hat.log_softmax(-1))
