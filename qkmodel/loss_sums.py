"""Means of losses between two reports, which a checkpoint takes along."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class LossSums:
    """Sums over the steps since the last reading, in float64; where the losses are, so that no step waits for a GPU."""

    steps: int = 0
    values: dict[str, Tensor | float] = field(default_factory=dict)

    def add(self, **values: Tensor | float) -> None:
        self.steps += 1
        for name, value in values.items():
            exact = value.detach().double() if isinstance(value, Tensor) else value
            self.values[name] = self.values.get(name, 0.0) + exact

    def state_tensors(self) -> dict[str, Tensor]:
        if self.steps == 0:
            return {}
        values = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in self.values.items()}
        return {"steps": torch.tensor(self.steps)} | {f"values.{name}": value for name, value in values.items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.steps = int(tensors.get("steps", 0))
        values = {name: value for name, value in tensors.items() if name != "steps"}
        self.values = {name.removeprefix("values."): value for name, value in values.items()}

    def take_means(self) -> dict[str, float]:
        means = {name: float(value) / self.steps for name, value in self.values.items()}
        self.steps, self.values = 0, {}
        return means
