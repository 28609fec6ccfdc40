"""Comparing attention patterns with the model's own over the validation sequences.

All figures are formed from sums pooled over batches, kept in float64; KL in nats. "No BOS" means: key
column 0 removed and rows renormalised, rows from the third on, because an attention sink on the first
token flatters the plain figure.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qkmodel.activations import ActivationCache
from qkmodel.attention import AttentionLayer
from qkmodel.forward_batch import forward_sequences
from qkmodel.kernels import pattern_comparison_cpu, pattern_comparison_plain
from qkmodel.kernels.pattern_comparison_sums import FIRST_NO_BOS_ROW, RowSums
from qkmodel.kernels.pattern_kl_terms import Keys, Queries, TruePattern
from qkmodel.pattern_kl import true_pattern

# Sequences of a batch, and its tokens where that is fewer: scores grow with the square of the context.
_BATCH, _BATCH_TOKENS = 8, 8192
TERMS = ("full", "query", "key")


@dataclass(frozen=True)
class TrueBatch:
    """One validation batch's true side, shared by everything that is compared with it.

    On a GPU there is no `pattern`: each comparison makes it again, a few sequences at a time.
    """

    layer: AttentionLayer
    x: Float[Tensor, "batch context d_model"]
    pattern: TruePattern | None


def evaluation_batch(context: int) -> int:
    """Sequences that are compared together."""
    return min(_BATCH, max(1, _BATCH_TOKENS // context))


def validation_batches(cache: ActivationCache, layer: AttentionLayer, sequences: int) -> Iterator[TrueBatch]:
    """The first `sequences` validation sequences in batches of `evaluation_batch`."""
    size = evaluation_batch(cache.context)
    for start in range(0, sequences, size):
        numbers = range(start, min(start + size, sequences))
        x = cache.read(layer.geometry.layer, "validation", list(numbers)).to(layer.w_q.device)
        yield TrueBatch(layer, x, None if x.is_cuda else true_pattern(layer, *layer.project(x), torch.float32))


def patched_batches(cache: ActivationCache, layer: AttentionLayer, sequences: int) -> Iterator[range]:
    """The first `sequences` validation sequences' numbers, in batches that go through the whole model."""
    size = patched_batch(cache.context, layer.w_q.device.type)
    for start in range(0, sequences, size):
        yield range(start, min(start + size, sequences))


def patched_batch(context: int, device: str) -> int:
    """Sequences that go through the whole model together, no more than are compared together."""
    together = evaluation_batch(context)
    return min(together, forward_sequences(context, device, together))


class PatternComparison:
    """Pooled figures of one reconstruction against the true pattern."""

    def __init__(self, n_heads: int) -> None:
        self._sums = RowSums(n_heads)
        self._rows_per_head = 0
        self._no_bos_rows = 0

    def add(self, true: TrueBatch, q_hat: Queries, k_hat: Keys) -> None:
        """Takes in a batch of reconstructed queries and keys (before rotary)."""
        if true.pattern is not None:
            pattern_comparison_cpu.add_rows(q_hat, k_hat, true.pattern, self._sums)
        else:
            pattern_comparison_plain.add_rows(q_hat, k_hat, true.layer, true.x, self._sums)
        batch, context, n_heads, _ = q_hat.shape
        self._rows_per_head += batch * context
        self._no_bos_rows += batch * n_heads * max(0, context - FIRST_NO_BOS_ROW)

    def kl(self, term: str = "full") -> float:
        """Mean KL over rows of the full, the query-only or the key-only reconstruction."""
        return float(self._sums.kl[TERMS.index(term)].sum()) / self._rows

    def kl_no_bos(self, term: str = "full") -> float:
        return float(self._sums.kl_no_bos[TERMS.index(term)]) / self._no_bos_rows

    def kl_of_heads(self) -> list[float]:
        return (self._sums.kl[0] / self._rows_per_head).tolist()

    def top1(self) -> float:
        """Share of rows whose largest entry is at the same key."""
        return float(self._sums.top1_and_error[0]) / self._rows

    def max_error(self) -> float:
        """Mean over rows of max |p − p̂|."""
        return float(self._sums.top1_and_error[1]) / self._rows

    @property
    def _rows(self) -> int:
        return self._rows_per_head * self._sums.kl.shape[1]
