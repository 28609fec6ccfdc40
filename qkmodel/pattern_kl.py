"""The loss: KL(true pattern ‖ reconstructed pattern), full and with one side reconstructed.

    pattern loss = 3·KL(p ‖ p̂(q̂,k̂)) + KL(p ‖ p̂(q̂,k)) + KL(p ‖ p̂(q,k̂))       (Wynroe & Sharkey 2024)

all means over batch × heads × query positions, in nats. The gradient of each term with respect to its
scores is p̂ − p, so nothing is differentiated through softmax and no score outlives its block. The fused form is
under `kernels/`; the plain one here is what it is tested against.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from qkmodel.attention import AttentionLayer
from qkmodel.kernels import pattern_kl_cpu
from qkmodel.kernels.pattern_kl_terms import FULL_WEIGHT, Keys, Queries, TruePattern


def _form(device: torch.device) -> ModuleType:
    """The fused form for a device: `true_pattern` and `pattern_kl_gradients`."""
    if device.type == "cuda":
        # Triton comes with torch's CUDA builds only
        from qkmodel.kernels import pattern_kl_triton

        return pattern_kl_triton
    return pattern_kl_cpu


@dataclass(frozen=True)
class PatternLoss:
    """`total` carries the gradient; the three means (nats) are for reading."""

    total: Float[Tensor, ""]
    full: Float[Tensor, ""]
    query_only: Float[Tensor, ""]
    key_only: Float[Tensor, ""]


@torch.no_grad()
def true_pattern(layer: AttentionLayer, q: Queries, k: Keys, product_dtype: torch.dtype) -> TruePattern:
    """The true side of a batch, from the model's own queries and keys (before rotary): computed once per pack."""
    return _form(q.device).true_pattern(layer, q, k, product_dtype)


def pattern_kl(q_hat: Queries, k_hat: Keys, true: TruePattern) -> PatternLoss:
    """The pattern loss of reconstructed queries and keys (before rotary), fused."""
    total, parts = _FusedPatternKL.apply(q_hat, k_hat, true)
    return PatternLoss(total, *parts.unbind())


def reference_pattern_kl(q_hat: Queries, k_hat: Keys, q: Queries, k: Keys, layer: AttentionLayer) -> PatternLoss:
    """The same loss written plainly, differentiated by autograd: what `pattern_kl` is tested against."""
    with torch.no_grad():
        log_p = layer.scores(q, k).log_softmax(-1)
    full = mean_kl(log_p, layer.scores(q_hat, k_hat).log_softmax(-1))
    query_only = mean_kl(log_p, layer.scores(q_hat, k).log_softmax(-1))
    key_only = mean_kl(log_p, layer.scores(q, k_hat).log_softmax(-1))
    return PatternLoss(FULL_WEIGHT * full + query_only + key_only, full, query_only, key_only)


def mean_kl(
    log_p: Float[Tensor, "batch n_heads rows columns"], log_p_hat: Float[Tensor, "batch n_heads rows columns"]
) -> Float[Tensor, ""]:
    """KL(p ‖ p̂) averaged over batch × heads × rows; masked entries (−inf in both) count as zero."""
    return row_kl(log_p, log_p_hat).mean()


def row_kl(log_p: Float[Tensor, "*rows columns"], log_p_hat: Float[Tensor, "*rows columns"]) -> Float[Tensor, "*rows"]:
    """KL(p ‖ p̂) of each row; masked entries (−inf in both) count as zero."""
    masked = log_p == float("-inf")
    return (log_p.exp() * (log_p - log_p_hat).masked_fill(masked, 0.0)).sum(-1)


class _FusedPatternKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, q_hat: Queries, k_hat: Keys, true: TruePattern
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "3"]]:
        parts, dq, dk = _form(q_hat.device).pattern_kl_gradients(q_hat, k_hat, true)
        ctx.save_for_backward(dq, dk)
        ctx.mark_non_differentiable(parts)
        return FULL_WEIGHT * parts[0] + parts[1] + parts[2], parts

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_total: Float[Tensor, ""], _grad_parts: Tensor
    ) -> tuple[Queries, Keys, None]:
        dq, dk = ctx.saved_tensors
        return dq * grad_total, dk * grad_total, None
