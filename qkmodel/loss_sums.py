"""Means of losses between two reports, which a checkpoint takes along."""

import torch
from torch import Tensor


class LossSums:
    """Sums over the steps since the last reading, in float64; where the losses are, so that no step waits for a GPU.

    A sum stays where it is in memory, since CUDA graphs write to the same places at every replay.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.steps = 0
        self._device = device
        self._sums: dict[str, Tensor] = {}

    def add(self, **values: Tensor | float) -> None:
        self.steps += 1
        for name, value in values.items():
            self._sum(name).add_(value.detach() if isinstance(value, Tensor) else value)

    def state_tensors(self) -> dict[str, Tensor]:
        if self.steps == 0:
            return {}
        return {"steps": torch.tensor(self.steps)} | {f"values.{name}": value for name, value in self._sums.items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.steps = int(tensors.get("steps", 0))
        for name in tensors.keys() - {"steps"}:
            self._sum(name.removeprefix("values."))
        for name, value in self._sums.items():
            value.copy_(tensors.get(f"values.{name}", torch.zeros(())))

    def take_means(self) -> dict[str, float]:
        means = {name: float(value) / self.steps for name, value in self._sums.items()} if self.steps else {}
        self.steps = 0
        for value in self._sums.values():
            value.zero_()
        return means

    def _sum(self, name: str) -> Tensor:
        if name not in self._sums:
            self._sums[name] = torch.zeros((), dtype=torch.float64, device=self._device)
        return self._sums[name]
