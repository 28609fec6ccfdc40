"""Comparing attention patterns with the model's own over the validation sequences.

All figures are formed from sums pooled over batches, kept in float64; KL in nats. "No BOS" means: key
column 0 removed and rows renormalised, rows from the third on, because an attention sink on the first
token flatters the plain figure.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from qkmodel.activations import ActivationCache
from qkmodel.attention import AttentionLayer
from qkmodel.pattern_kl import row_kl

EVALUATION_BATCH = 8
FIRST_NO_BOS_ROW = 2

Queries = Float[Tensor, "batch context n_heads d_head"]
Keys = Float[Tensor, "batch context n_kv_heads d_head"]
LogPattern = Float[Tensor, "batch n_heads context context"]


@dataclass(frozen=True)
class TrueBatch:
    """One validation batch's true side, shared by everything that is compared with it."""

    x: Float[Tensor, "batch context d_model"]
    q: Queries
    k: Keys
    log_p: LogPattern
    log_p_no_bos: LogPattern


def validation_batches(cache: ActivationCache, layer: AttentionLayer, sequences: int) -> Iterator[TrueBatch]:
    """The first `sequences` validation sequences in batches of `EVALUATION_BATCH`."""
    for start in range(0, sequences, EVALUATION_BATCH):
        numbers = range(start, min(start + EVALUATION_BATCH, sequences))
        x = cache.read(layer.geometry.layer, "validation", list(numbers))
        q, k = layer.project(x)
        log_p, log_p_no_bos = log_patterns(layer, q, k)
        yield TrueBatch(x, q, k, log_p, log_p_no_bos)


def log_patterns(layer: AttentionLayer, q: Queries, k: Keys) -> tuple[LogPattern, LogPattern]:
    """log p with every column, and with column 0 removed (rows from the third on)."""
    scores = layer.scores(q, k)
    return scores.log_softmax(-1), scores[..., FIRST_NO_BOS_ROW:, 1:].log_softmax(-1)


class KLSums:
    """Pooled sums of row KL against the true pattern, per head, plain and without BOS."""

    def __init__(self) -> None:
        self.per_head: Tensor | float = 0.0
        self.no_bos: float = 0.0
        self.rows_per_head = 0
        self.rows_no_bos = 0

    def add(self, true: TrueBatch, log_p_hat: LogPattern, log_p_hat_no_bos: LogPattern) -> None:
        kl = row_kl(true.log_p, log_p_hat).double()
        self.per_head = self.per_head + kl.sum((0, 2))
        self.rows_per_head += kl.shape[0] * kl.shape[2]
        no_bos = row_kl(true.log_p_no_bos, log_p_hat_no_bos).double()
        self.no_bos += no_bos.sum().item()
        self.rows_no_bos += no_bos.numel()

    def heads(self) -> list[float]:
        return (self.per_head / self.rows_per_head).tolist()

    def mean(self) -> float:
        return (self.per_head / self.rows_per_head).mean().item()

    def mean_no_bos(self) -> float:
        return self.no_bos / self.rows_no_bos
