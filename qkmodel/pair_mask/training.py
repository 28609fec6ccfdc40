"""Training a mask on the salient pairs, alone or with the dictionary's rows and biases, until each is kept or not.

    loss = KL(p ‖ p̂_masked) + pair_cost · penalty(mask)

KL is the mean over heads and rows of the layer, so `pair_cost` is in nats: what a pair has to save to be kept.
"""

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from qkmodel.attention import AttentionLayer
from qkmodel.loss_sums import LossSums
from qkmodel.pair_mask.hyperparameters import MaskHyperparameters
from qkmodel.pair_mask.mask_forms import FORMS
from qkmodel.pair_mask.masked_scores import Mask, MaskGradient, mask_gradient
from qkmodel.pair_mask.pair_set import PairSet
from qkmodel.pair_mask.score_terms import SequenceCodes
from qkmodel.transcoder import QKTranscoder

KEPT_ABOVE = 0.5
# Learning rates are constant for this share of the steps that they are used in, then fall to 0.
CONSTANT_SHARE = 0.5


@dataclass(frozen=True)
class Batch:
    """Some sequences: what the layer received, and their codes in the dictionary as it was given."""

    x: Float[Tensor, "sequences context d_model"]
    codes: Sequence[SequenceCodes]


class MaskTrainer:
    """One mask's training. `steps` is how many there will be.

    Whatever the next step depends on, besides the data, is in `state_tensors`.
    """

    def __init__(
        self,
        hyperparameters: MaskHyperparameters,
        transcoder: QKTranscoder,
        layer: AttentionLayer,
        candidates: PairSet,
        steps: int,
    ) -> None:
        self.hyperparameters = hyperparameters
        self.layer = layer
        self.candidates = candidates
        self.steps = steps
        self.steps_done = 0
        self.transcoder = copy.deepcopy(transcoder).requires_grad_(False)
        self._mask = FORMS[hyperparameters.form](len(candidates))
        # gradients are of the size of pair_cost, far below Adam's usual ε
        self._mask_optimiser = torch.optim.Adam(
            self._mask.parameters(), lr=hyperparameters.learning_rate, eps=1e-4 * hyperparameters.pair_cost
        )
        self._joint_optimiser: torch.optim.Adam | None = None
        if hyperparameters.joint:
            self._joint_optimiser = torch.optim.Adam(self._trained_along(), lr=hyperparameters.joint_rate)
        self.kept: PairSet | None = None
        self.losses = LossSums()

    def _trained_along(self) -> list[nn.Parameter]:
        trained: list[nn.Parameter] = []
        for side in (self.transcoder.query, self.transcoder.key):
            trained += [side.W_dec, side.b_out]
            if self.hyperparameters.encoders:
                trained += [side.W_enc, side.b_enc]
        return [parameter.requires_grad_(True) for parameter in trained]

    @property
    def mask_steps(self) -> int:
        """The steps after which pairs are kept or not."""
        return max(1, round(self.steps * (1 - self.hyperparameters.share_settled)))

    def step(self, batch: Batch, pool: ThreadPoolExecutor) -> None:
        """One step on a batch of sequences."""
        if self.kept is None:
            kl, pairs = self._step_of_mask(batch, pool)
        else:
            kl, pairs = self._step_of_dictionary(batch, pool), float(len(self.kept))
        self.losses.add(loss=kl + self.hyperparameters.pair_cost * pairs, train_kl=kl, train_pairs=pairs)
        self.steps_done += 1
        if self.steps_done == self.mask_steps:
            self.kept = self.chosen()

    def chosen(self) -> PairSet:
        """The pairs that are kept, or would be if the choice were made now."""
        if self.kept is not None:
            return self.kept
        return self.candidates.subset(self._mask.settled().numpy() > KEPT_ABOVE)

    @property
    def is_finite(self) -> bool:
        """Whether every number that is trained is one."""
        return all(parameter.isfinite().all() for parameter in self._trained().values())

    def _step_of_mask(self, batch: Batch, pool: ThreadPoolExecutor) -> tuple[float, float]:
        """The KL of the mask that the step was taken with, and about how many pairs that keeps."""
        mask = self._mask.sample(self._noise())
        found = self._gradient(batch, self.candidates, mask.detach().numpy(), pool)
        mask.backward(torch.from_numpy(found.mask))
        penalty = self._mask.penalty()
        (self.hyperparameters.pair_cost * penalty).backward()
        factor = _rate(self.steps_done / self.mask_steps)
        _descend(self._mask_optimiser, self.hyperparameters.learning_rate * factor)
        self._mask.after_step()
        if self._joint_optimiser is not None:
            self._descend_dictionary()
        return found.kl, penalty.item()

    def _noise(self) -> torch.Generator:
        """A function of seed and step, so that nothing of it has to be kept."""
        # torch takes no more than 32 bits of a seed
        state = np.random.SeedSequence((self.hyperparameters.seed, self.steps_done)).generate_state(1)
        return torch.Generator().manual_seed(int(state[0]))

    def _step_of_dictionary(self, batch: Batch, pool: ThreadPoolExecutor) -> float:
        found = self._gradient(batch, self.kept, np.ones(len(self.kept), np.float32), pool)
        self._descend_dictionary()
        return found.kl

    def _gradient(self, batch: Batch, pairs: PairSet, mask: Mask, pool: ThreadPoolExecutor) -> MaskGradient:
        x = batch.x if self.hyperparameters.encoders else None
        return mask_gradient(self.transcoder, self.layer, batch.codes, pairs, mask, pool, x)

    def _descend_dictionary(self) -> None:
        factor = _rate(self.steps_done / self.steps)
        _descend(self._joint_optimiser, self.hyperparameters.joint_rate * factor)

    def _trained(self) -> dict[str, nn.Parameter]:
        named = {f"mask.{name}": parameter for name, parameter in self._mask.named_parameters()}
        along = self.transcoder.named_parameters()
        named |= {f"transcoder.{name}": parameter for name, parameter in along if parameter.requires_grad}
        return named

    def state_tensors(self) -> dict[str, Tensor]:
        """Steps done, mask, what is trained along, moments, the choice if made, and losses not read yet."""
        tensors = {"steps_done": torch.tensor(self.steps_done)}
        if self.kept is not None:
            tensors["kept"] = torch.from_numpy(self.kept.numbers)
        for name, parameter in self._trained().items():
            tensors[name] = parameter
            for key, value in self._optimiser_of(name).state[parameter].items():
                tensors[f"optimiser.{name}.{key}"] = value
        return tensors | {f"losses.{name}": value for name, value in self.losses.state_tensors().items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state_tensors`.

        Raises KeyError or RuntimeError when a tensor is missing or has another shape.
        """
        self.steps_done = int(tensors["steps_done"])
        for name, parameter in self._trained().items():
            moments = {key: tensors[f"optimiser.{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            if any(tensor.shape != parameter.shape for tensor in (tensors[name], moments["exp_avg"])):
                raise RuntimeError(f"{name} does not have its shape {tuple(parameter.shape)}")
            with torch.no_grad():
                parameter.copy_(tensors[name])
            self._optimiser_of(name).state[parameter] = {key: value.clone() for key, value in moments.items()}
        if self.steps_done >= self.mask_steps:
            self.kept = PairSet.from_numbers(tensors["kept"].numpy(), self.candidates.shape)
        losses = {name: value for name, value in tensors.items() if name.startswith("losses.")}
        self.losses.load_state_tensors({name.removeprefix("losses."): value for name, value in losses.items()})

    def _optimiser_of(self, name: str) -> torch.optim.Adam:
        return self._mask_optimiser if name.startswith("mask.") else self._joint_optimiser


def _rate(progress: float) -> float:
    return min(1.0, (1 - progress) / (1 - CONSTANT_SHARE))


def _descend(optimiser: torch.optim.Adam, learning_rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = learning_rate
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
