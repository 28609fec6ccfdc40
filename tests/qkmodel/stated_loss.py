"""What a training minimises, written plainly in float64 as docstrings state it, for autograd to differentiate.

Nothing here is shared with the engine but constants, initial weights and the plain pattern loss.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qkmodel.attention import AttentionLayer
from qkmodel.hyperparameters import SideHyperparameters
from qkmodel.pattern_kl import reference_pattern_kl
from qkmodel.sparsity import (
    FINAL_EXPONENT,
    JUMP_BANDWIDTH,
    PRE_ACTIVATION_WEIGHT,
    SQRT_EPSILON,
    TANH_SLOPE,
    THRESHOLD_RATE,
)
from qkmodel.sparsity_control import FAST, INITIAL_COEFFICIENT, LARGEST_MOVE, SLOW, TRAVEL, TREND_WEIGHT
from qkmodel.transcoder import QKTranscoder, Transcoder


@dataclass
class StatedSide:
    """The query or the key side: its transcoder in float64, λ, and what its penalty and activation remember."""

    transcoder: Transcoder
    given: SideHyperparameters
    coefficient: float = 0.0
    # of p-annealing
    exponent: float = 1.0
    c: float = 1.0
    # of BatchTopK
    threshold: float | None = None
    # of a steered coefficient: running means of log l0, fast and slow, and where the training was
    means: list[float] = field(default_factory=list)
    progress: float = 0.0

    def __post_init__(self) -> None:
        steered = self.given.target_l0 is not None
        self.coefficient = INITIAL_COEFFICIENT if steered else self.given.sparsity_coefficient or 0.0
        self.means = [math.log(self.given.dictionary_size / 2)] * 2

    def pre(self, x: Tensor) -> Tensor:
        """Encoder outputs [batch, context, features] of inputs `x` [batch, context, d_model]."""
        return (x - self.transcoder.b_pre) @ self.transcoder.W_enc.T + self.transcoder.b_enc

    def gate(self, pre: Tensor) -> Tensor:
        """JumpReLU's step: 1 where pre > θ; its gradient with respect to log θ is −1/ε inside the window, else 0."""
        log_threshold = self.transcoder.activation.log_threshold
        above = (pre.detach() > log_threshold.detach().exp()).double()
        distance = pre.detach().clamp(min=1e-300).log() - log_threshold.detach()
        window = (distance.abs() < JUMP_BANDWIDTH / 2).double() / JUMP_BANDWIDTH
        return above - window * (log_threshold - log_threshold.detach())

    def activate(self, pre: Tensor) -> Tensor:
        """Activations of a batch that is trained on; moves BatchTopK's threshold."""
        if self.given.activation == "topk":
            return torch.relu(pre) * (pre >= pre.detach().sort(descending=True).values[..., self.given.k - 1, None])
        if self.given.activation == "batchtopk":
            counted = pre.detach()[:, 1:]
            kept = self.given.k * counted.shape[0] * counted.shape[1]
            smallest = counted.flatten().sort(descending=True).values[kept - 1].item()
            before, bounded = self.threshold, max(smallest, 0.0)
            self.threshold = bounded if before is None else before + THRESHOLD_RATE * (bounded - before)
            return torch.relu(pre) * (pre >= smallest)
        return self.gate(pre) * pre if self.given.activation == "jumprelu" else torch.relu(pre)

    def omega(self, pre: Tensor, f: Tensor, progress: float) -> Tensor | float:
        """The penalty before its coefficient."""
        tokens = pre.shape[0] * pre.shape[1]
        norms = self.transcoder.W_dec.norm(dim=-1)
        if self.given.activation == "jumprelu":
            threshold = self.transcoder.activation.log_threshold.exp()
            below = torch.relu(threshold - pre) * norms.detach()
            return (self.gate(pre).sum() + PRE_ACTIVATION_WEIGHT * below.sum()) / tokens
        a = f * norms
        match self.given.penalty:
            case "l1":
                return a.sum() / tokens
            case "sqrt":
                return _power_sum(a, 0.5) / tokens
            case "tanh":
                return torch.tanh(TANH_SLOPE * a).sum() / tokens
            case "p_annealing":
                return self._annealed(a, progress) / tokens
        return 0.0

    def _annealed(self, a: Tensor, progress: float) -> Tensor:
        exponent = 1 - (1 - FINAL_EXPONENT) * progress
        total = _power_sum(a, exponent)
        # c absorbs the fall of p
        self.c *= _power_sum(a, self.exponent).item() / total.item()
        self.exponent = exponent
        return self.c * total

    def steer(self, f: Tensor, progress: float) -> None:
        """Moves λ by how many features were active, position 0 left out."""
        if self.given.target_l0 is None:
            return
        log_l0 = math.log((f[:, 1:] > 0).sum(-1).double().mean().item())
        self.means = [mean + rate * (log_l0 - mean) for mean, rate in zip(self.means, (FAST, SLOW), strict=True)]
        fast, slow = self.means
        if progress < 0.9:
            error = fast - math.log(self.given.target_l0) + TREND_WEIGHT * (fast - slow)
            move = min(LARGEST_MOVE, TRAVEL * (progress - self.progress))
            self.coefficient *= math.exp(move * min(1.0, max(-1.0, error)))
        self.progress = progress


def stated_step(
    model: QKTranscoder,
    sides: tuple[StatedSide, StatedSide],
    optimiser: torch.optim.Optimizer,
    x: Tensor,
    layer: AttentionLayer,
    progress: float,
) -> None:
    """One step of the plain optimiser on inputs `x` [batch, context, d_model]; all in float64."""
    q, k = layer.project(x)
    pres = [side.pre(x) for side in sides]
    codes = [side.activate(pre) for side, pre in zip(sides, pres, strict=True)]
    q_hat, k_hat = (
        (f @ side.transcoder.W_dec + side.transcoder.b_out).unflatten(-1, (-1, layer.geometry.d_head))
        for side, f in zip(sides, codes, strict=True)
    )
    loss = reference_pattern_kl(q_hat, k_hat, q, k, layer).total
    for side, pre, f in zip(sides, pres, codes, strict=True):
        loss = loss + side.coefficient * side.omega(pre, f, progress)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    for side, f in zip(sides, codes, strict=True):
        side.steer(f.detach(), progress)


def _power_sum(a: Tensor, exponent: float) -> Tensor:
    return ((a + SQRT_EPSILON) ** exponent - SQRT_EPSILON**exponent).sum()
