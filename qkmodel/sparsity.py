"""Activation functions and sparsity penalties of a transcoder, each one small class.

`features` is the dictionary size; `pre` are encoder outputs before the activation.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qkmodel.hyperparameters import Hyperparameters

SQRT_EPSILON = 1e-6


class ReLU(nn.Module):
    """f = max(pre, 0)."""

    def forward(self, pre: Float[Tensor, "*tokens features"]) -> Float[Tensor, "*tokens features"]:
        return torch.relu(pre)


class TopK(nn.Module):
    """Keeps the k largest rectified pre-activations of each token (Gao et al. 2024, arXiv:2406.04093).

    A token with fewer than k positive pre-activations keeps only those, so at most k features are active.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, pre: Float[Tensor, "*tokens features"]) -> Float[Tensor, "*tokens features"]:
        kept = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, kept.indices, torch.relu(kept.values))


class L1Penalty(nn.Module):
    """Ω = mean over tokens of Σ a."""

    def forward(self, scaled: Float[Tensor, "*tokens features"]) -> Float[Tensor, ""]:
        return scaled.sum(-1).mean()


class SqrtPenalty(nn.Module):
    """Ω = mean over tokens of Σ (sqrt(a + ε) − sqrt(ε)), ε = 1e-6 (Wynroe & Sharkey 2024).

    ε keeps the slope finite at zero; subtracting sqrt(ε) makes an inactive feature cost nothing.
    """

    def forward(self, scaled: Float[Tensor, "*tokens features"]) -> Float[Tensor, ""]:
        return (torch.sqrt(scaled + SQRT_EPSILON) - SQRT_EPSILON**0.5).sum(-1).mean()


def make_activation(hyperparameters: Hyperparameters) -> nn.Module:
    """The activation function that these hyperparameters name."""
    if hyperparameters.activation == "topk":
        return TopK(hyperparameters.k)
    return ReLU()


def make_penalty(hyperparameters: Hyperparameters) -> nn.Module | None:
    """The penalty on decoder-norm-scaled activations a = f·‖w_dec‖, or None (TopK has none)."""
    if hyperparameters.penalty is None:
        return None
    return {"l1": L1Penalty, "sqrt": SqrtPenalty}[hyperparameters.penalty]()
