"""The coefficient of a penalty: as given, or steered so that a side ends up with a wanted number of active features."""

import math

import torch
from torch import Tensor, nn

from qkmodel.hyperparameters import SideHyperparameters

# Where λ starts when only a target is given.
INITIAL_COEFFICIENT = 1e-2
# How far log λ moves over a whole training while l0 is off by a factor of e or more, and at most in one step.
TRAVEL = 20.0
LARGEST_MOVE = 0.1
# How fast the two running means of log l0 follow the batches; their difference is l0's trend.
FAST, SLOW = 0.2, 0.04
# How much a trend counts: features die slowly after λ has risen, and λ must not go on rising meanwhile.
TREND_WEIGHT = 3.0


class Coefficient(nn.Module):
    """λ of one side. With `target_l0` it rises while more features are active, and falls while fewer are.

    The last tenth of a training keeps λ fixed, so that the optimum does not move under it any more. In trainings of
    600 steps or more on SmolLM2 the held-out l0 ends within a tenth of the target (`tests/system/test_engine.py`).
    """

    def __init__(self, side: SideHyperparameters) -> None:
        super().__init__()
        self.target = side.target_l0
        initial = INITIAL_COEFFICIENT if self.target is not None else side.sparsity_coefficient
        self.register_buffer("value", torch.tensor(0.0 if initial is None else initial, dtype=torch.float64))
        self.register_buffer("means", torch.full((2,), math.log(side.dictionary_size / 2), dtype=torch.float64))
        self.register_buffer("progress", torch.zeros((), dtype=torch.float64))

    def observe(self, l0: Tensor | float, progress: float) -> None:
        """Takes in one batch's active features per token; `progress` is the share of the training that is done."""
        if self.target is None:
            return
        log_l0 = math.log(max(float(l0), 1e-3))
        self.means.add_(torch.tensor((FAST, SLOW), dtype=torch.float64) * (log_l0 - self.means))
        fast, slow = self.means.tolist()
        if progress < 0.9:
            error = fast - math.log(self.target) + TREND_WEIGHT * (fast - slow)
            move = min(LARGEST_MOVE, TRAVEL * (progress - self.progress.item()))
            self.value.mul_(math.exp(move * max(-1.0, min(1.0, error))))
        self.progress.fill_(progress)
