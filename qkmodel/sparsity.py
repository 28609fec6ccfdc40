"""Activation functions and sparsity penalties of a transcoder, each one small class.

`features` is the dictionary size; `pre` are encoder outputs before the activation. An activation's `forward` is what
a finished dictionary computes. Those that learn otherwise say so: `training_forward` sees a whole batch.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qkmodel.hyperparameters import SideHyperparameters

SQRT_EPSILON = 1e-6
# Slope of tanh at zero, Anthropic's (transformer-circuits.pub/2025/january-update).
TANH_SLOPE = 4.0
# Width of JumpReLU's straight-through window, in log units of the threshold.
JUMP_BANDWIDTH = 0.5
# Weight of JumpReLU's pre-activation term beside its L0 term.
PRE_ACTIVATION_WEIGHT = 3e-6
# How fast BatchTopK's inference threshold follows the batches.
THRESHOLD_RATE = 0.1
# Where the exponent of p-annealing ends.
FINAL_EXPONENT = 0.2

Features = Float[Tensor, "*tokens features"]
Scaled = Float[Tensor, "*active"]
Batch = Float[Tensor, "batch context features"]


class Activation(nn.Module):
    """Turns pre-activations into non-negative feature activations."""

    def forward(self, pre: Features) -> Features:
        raise TypeError(f"{type(self).__name__} does not say what it computes")

    def training_forward(self, pre: Batch) -> Batch:
        """The same for a batch that is trained on; differs where the whole batch decides."""
        return self(pre)


class ReLU(Activation):
    """f = max(pre, 0)."""

    def forward(self, pre: Features) -> Features:
        return torch.relu(pre)


class TopK(Activation):
    """Keeps the k largest rectified pre-activations of each token (Gao et al. 2024, arXiv:2406.04093).

    A token with fewer than k positive pre-activations keeps only those, so at most k features are active.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, pre: Features) -> Features:
        kept = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, kept.indices, torch.relu(kept.values))


class BatchTopK(Activation):
    """Keeps the k · tokens largest rectified pre-activations of a batch (Bussmann et al. 2024, arXiv:2412.06410).

    Position 0 is left out of the budget and kept by what the others' smallest is. A finished dictionary keeps what
    lies above `threshold`, the running mean of the smallest value that batches kept, so a token's features do not
    depend on its neighbours.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self.register_buffer("threshold", torch.zeros(()))

    def forward(self, pre: Features) -> Features:
        return torch.where(pre > self.threshold, torch.relu(pre), 0.0)

    def training_forward(self, pre: Batch) -> Batch:
        counted = pre.detach()[:, 1:].flatten()
        smallest = counted.topk(self.budget(pre.shape[0], pre.shape[1]), sorted=False).values.min()
        self.follow(smallest.clamp(min=0.0))
        return torch.where(pre >= smallest, torch.relu(pre), 0.0)

    def budget(self, batch: int, context: int) -> int:
        """Features that a batch keeps, position 0 left out."""
        return self.k * batch * (context - 1)

    @torch.no_grad()
    def follow(self, smallest: Float[Tensor, ""]) -> None:
        """Moves the threshold towards the smallest value that a batch kept; the first batch sets it."""
        rate = torch.where(self.threshold > 0, THRESHOLD_RATE, 1.0)
        self.threshold.add_(rate * (smallest - self.threshold))


class JumpReLU(Activation):
    """f = pre where pre > θ, else 0, with a threshold per feature (Rajamanoharan et al. 2024, arXiv:2407.14435).

    `log_threshold` [features] learns through a rectangular window around the jump. The window is as wide in
    log(pre / θ) for every θ, so nothing depends on the scale of the layer's input.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.log_threshold = nn.Parameter(torch.zeros(features))

    def forward(self, pre: Features) -> Features:
        return _Jump.apply(pre, self.log_threshold) * pre


class _Jump(torch.autograd.Function):
    """1 where pre > θ; gradient with respect to log θ only, −1/ε inside the window."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, pre: Features, log_threshold: Tensor) -> Features:
        ctx.save_for_backward(pre, log_threshold)
        return (pre > log_threshold.exp()).to(pre.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Features) -> tuple[None, Tensor]:
        pre, log_threshold = ctx.saved_tensors
        distance = pre.clamp(min=torch.finfo(pre.dtype).tiny).log() - log_threshold
        window = (distance.abs() < JUMP_BANDWIDTH / 2) / JUMP_BANDWIDTH
        return None, -(gradient * window).flatten(0, -2).sum(0)


class Penalty(nn.Module):
    """Ω, a mean over tokens of a sum to which inactive features add nothing.

    `scaled` holds f·‖w_dec‖ of a batch of `tokens`, so that shrinking f and growing the decoder row gains nothing; of
    all features or, flat, of the active ones alone. `progress` is the share of the training that is done.
    """

    def forward(self, scaled: Scaled, tokens: int, progress: float) -> Float[Tensor, ""]:
        raise TypeError(f"{type(self).__name__} does not say what it computes")


class L1Penalty(Penalty):
    """Ω = mean over tokens of Σ a."""

    def forward(self, scaled: Scaled, tokens: int, progress: float) -> Float[Tensor, ""]:
        return scaled.sum() / tokens


class SqrtPenalty(Penalty):
    """Ω = mean over tokens of Σ (sqrt(a + ε) − sqrt(ε)), ε = 1e-6 (Wynroe & Sharkey 2024).

    ε keeps the slope finite at zero; subtracting sqrt(ε) makes an inactive feature cost nothing.
    """

    def forward(self, scaled: Scaled, tokens: int, progress: float) -> Float[Tensor, ""]:
        return (torch.sqrt(scaled + SQRT_EPSILON) - SQRT_EPSILON**0.5).sum() / tokens


class TanhPenalty(Penalty):
    """Ω = mean over tokens of Σ tanh(4·a) (Anthropic, January 2025 update)."""

    def forward(self, scaled: Scaled, tokens: int, progress: float) -> Float[Tensor, ""]:
        return torch.tanh(TANH_SLOPE * scaled).sum() / tokens


class AnnealedPenalty(Penalty):
    """Ω = mean over tokens of c·Σ ((a + ε)^p − ε^p), p falling from 1 to 0.2 (Karvonen et al. 2024, arXiv:2408.00113).

    `c` starts at 1 and absorbs each fall of p, so that Ω itself does not jump.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("exponent", torch.ones(()))
        self.register_buffer("c", torch.ones(()))

    def forward(self, scaled: Scaled, tokens: int, progress: float) -> Float[Tensor, ""]:
        exponent = torch.tensor(1.0 - (1.0 - FINAL_EXPONENT) * min(1.0, progress))
        omega = self._sum(scaled, exponent) / tokens
        if exponent != self.exponent:
            with torch.no_grad():
                before = self._sum(scaled, self.exponent) / tokens
                self.c.mul_(torch.where(omega > 0, before / omega.clamp(min=1e-12), 1.0).to(self.c.device))
                self.exponent.copy_(exponent)
        return self.c * omega

    @staticmethod
    def _sum(scaled: Scaled, exponent: Float[Tensor, ""]) -> Float[Tensor, ""]:
        return ((scaled + SQRT_EPSILON) ** exponent - SQRT_EPSILON**exponent).sum()


PENALTIES: dict[str, type[Penalty]] = {
    "l1": L1Penalty,
    "sqrt": SqrtPenalty,
    "tanh": TanhPenalty,
    "p_annealing": AnnealedPenalty,
}


def jump_penalty(pre: Features, activation: JumpReLU, decoder_norms: Float[Tensor, "features"]) -> Float[Tensor, ""]:
    """JumpReLU's Ω: the mean number of active features, and a push upwards for those below their threshold.

    The second term, Σ max(θ − pre, 0)·‖w_dec‖ (Anthropic, January 2025 update), reaches features that never fire.
    """
    active = _Jump.apply(pre, activation.log_threshold).sum(-1).mean()
    below = torch.relu(activation.log_threshold.exp() - pre) * decoder_norms.detach()
    return active + PRE_ACTIVATION_WEIGHT * below.sum(-1).mean()


def make_activation(side: SideHyperparameters) -> Activation:
    """The activation function that these hyperparameters name."""
    match side.activation:
        case "topk":
            return TopK(side.k)
        case "batchtopk":
            return BatchTopK(side.k)
        case "jumprelu":
            return JumpReLU(side.dictionary_size)
    return ReLU()
