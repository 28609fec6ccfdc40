"""Masks with entries between 0 and 1 while they are trained, and what keeping pairs costs.

Both end in a choice: a pair is kept where its entry is above one half.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qkmodel.pair_mask.hyperparameters import Form


class SqrtMask(nn.Module):
    """Entries m in [0, 1] themselves, penalised by Σ (√(m + ε) − √ε), which pulls them to 0 or leaves them at 1.

    The paper's penalty (Wynroe & Sharkey 2024), with an ε at which its slope at 0 is twenty times that at 1, not
    without bound: a pair that was pushed out can come back.
    """

    EPSILON = 2.5e-3

    def __init__(self, pairs: int) -> None:
        super().__init__()
        self.entries = nn.Parameter(torch.ones(pairs))

    def sample(self, generator: torch.Generator) -> Float[Tensor, "pairs"]:
        """The mask of one step."""
        return self.entries * 1.0

    def penalty(self) -> Float[Tensor, ""]:
        """About how many pairs are kept."""
        return ((self.entries + self.EPSILON).sqrt() - self.EPSILON**0.5).sum()

    @torch.no_grad()
    def after_step(self) -> None:
        self.entries.clamp_(0, 1)

    @torch.no_grad()
    def settled(self) -> Float[Tensor, "pairs"]:
        """The mask without chance."""
        return self.entries.clone()


class HardConcreteMask(nn.Module):
    """Stretched and clamped concrete variables, penalised by how likely each is not 0 (Louizos, Welling & Kingma 2018).

    A step's entry is clamp(σ((log u − log(1 − u) + log α) / β) · (ζ − γ) + γ) to [0, 1], u uniform.
    """

    BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
    # where an entry is 1 in eight of ten draws
    INITIAL = 3.0

    def __init__(self, pairs: int) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.full((pairs,), self.INITIAL))

    def sample(self, generator: torch.Generator) -> Float[Tensor, "pairs"]:
        """The mask of one step."""
        u = torch.rand(len(self.log_alpha), generator=generator).clamp(1e-6, 1 - 1e-6)
        return self._stretched((torch.logit(u) + self.log_alpha) / self.BETA)

    def penalty(self) -> Float[Tensor, ""]:
        """How many pairs are expected to be kept."""
        return torch.sigmoid(self.log_alpha - self.BETA * math.log(-self.GAMMA / self.ZETA)).sum()

    def after_step(self) -> None:
        """Nothing: any log α will do."""

    @torch.no_grad()
    def settled(self) -> Float[Tensor, "pairs"]:
        """The mask without chance."""
        return self._stretched(self.log_alpha)

    def _stretched(self, logits: Float[Tensor, "pairs"]) -> Float[Tensor, "pairs"]:
        return (torch.sigmoid(logits) * (self.ZETA - self.GAMMA) + self.GAMMA).clamp(0, 1)


FORMS: dict[Form, type[SqrtMask | HardConcreteMask]] = {"sqrt": SqrtMask, "hard_concrete": HardConcreteMask}
