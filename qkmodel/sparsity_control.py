"""The coefficient of a penalty: as given, or steered so that a side ends up with a wanted number of active features."""

import math

import torch
from torch import nn

from qkmodel.hyperparameters import SideHyperparameters

# Where λ starts when only a target is given.
INITIAL_COEFFICIENT = 1e-2
# How far log λ moves per step when l0 is off by a factor of e; larger errors count as that.
GAIN = 0.02
# How fast the l0 that is compared with the target follows the batches.
SMOOTHING = 0.1


class Coefficient(nn.Module):
    """λ of one side. With `target_l0` it rises while more features are active, and falls while fewer are.

    The last tenth of a training keeps λ fixed, so that the optimum does not move under it any more. On SmolLM2 the
    held-out l0 ends within a tenth of the target (`tests/system`, `benchmarks/activations.py`).
    """

    def __init__(self, side: SideHyperparameters) -> None:
        super().__init__()
        self.target = side.target_l0
        initial = INITIAL_COEFFICIENT if self.target is not None else side.sparsity_coefficient
        self.register_buffer("value", torch.tensor(0.0 if initial is None else initial, dtype=torch.float64))
        self.register_buffer("l0", torch.zeros((), dtype=torch.float64))

    def observe(self, l0: float, progress: float) -> None:
        """Takes in one batch's active features per token; `progress` is the share of the training that is done."""
        if self.target is None:
            return
        self.l0.add_((SMOOTHING if self.l0 > 0 else 1.0) * (l0 - self.l0))
        if progress < 0.9:
            error = math.log(max(self.l0.item(), 1e-3) / self.target)
            self.value.mul_(math.exp(GAIN * max(-1.0, min(1.0, error))))
