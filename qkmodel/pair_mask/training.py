"""Training a mask on the salient pairs, alone or with decoder rows and biases, until each is kept or not.

    loss = KL(p ‖ p̂_masked) + pair_cost · penalty(mask)

KL is the mean over heads and rows of the layer, so `pair_cost` is in nats: what a pair has to save to be kept.
"""

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from pydantic import Field
from torch import nn

from qkmodel.attention import AttentionLayer
from qkmodel.pair_mask.mask_forms import FORMS, Form
from qkmodel.pair_mask.masked_scores import mask_gradient
from qkmodel.pair_mask.pair_set import PairSet
from qkmodel.pair_mask.score_terms import SequenceCodes
from qkmodel.schema import Schema
from qkmodel.transcoder import QKTranscoder

KEPT_ABOVE = 0.5
# Learning rates are constant for this share of the steps that they are used in, then fall to 0.
CONSTANT_SHARE = 0.5


class MaskHyperparameters(Schema):
    """What one training of a mask may differ in.

    With `joint` decoder rows and output biases are trained along, at `decoder_learning_rate`, and go on for the last
    `settled_share` of the steps after the choice of pairs is made; activations stay as they are.
    """

    form: Form = "sqrt"
    pair_cost: float = Field(gt=0)
    learning_rate: float = Field(default=0.03, gt=0)
    joint: bool = False
    decoder_learning_rate: float = Field(default=1e-3, gt=0)
    settled_share: float = Field(default=0.3, ge=0, lt=1)
    seed: int = Field(default=0, ge=0, lt=2**31)


class MaskTrainer:
    """One mask's training. `steps` is how many there will be; whatever the next depends on, besides data, is here."""

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
        self._decoder_optimiser: torch.optim.Adam | None = None
        if hyperparameters.joint:
            sides = (self.transcoder.query, self.transcoder.key)
            trained: list[nn.Parameter] = [parameter for side in sides for parameter in (side.W_dec, side.b_out)]
            for parameter in trained:
                parameter.requires_grad_(True)
            self._decoder_optimiser = torch.optim.Adam(trained, lr=hyperparameters.decoder_learning_rate)
        self.kept: PairSet | None = None

    @property
    def mask_steps(self) -> int:
        """The steps after which pairs are kept or not."""
        share = self.hyperparameters.settled_share if self.hyperparameters.joint else 0.0
        return max(1, round(self.steps * (1 - share)))

    def step(self, batch: Sequence[SequenceCodes], pool: ThreadPoolExecutor) -> float:
        """One step on a batch of sequences; the KL (nats) of the mask that it was taken with."""
        kl = self._step_of_mask(batch, pool) if self.kept is None else self._step_of_decoders(batch, pool)
        self.steps_done += 1
        if self.steps_done == self.mask_steps:
            self.kept = self.candidates.subset(self._mask.settled().numpy() > KEPT_ABOVE)
        return kl

    def _step_of_mask(self, batch: Sequence[SequenceCodes], pool: ThreadPoolExecutor) -> float:
        mask = self._mask.sample(self._noise())
        found = mask_gradient(self.transcoder, self.layer, batch, self.candidates, mask.detach().numpy(), pool)
        mask.backward(torch.from_numpy(found.mask))
        (self.hyperparameters.pair_cost * self._mask.penalty()).backward()
        factor = _rate(self.steps_done / self.mask_steps)
        _descend(self._mask_optimiser, self.hyperparameters.learning_rate * factor)
        self._mask.after_step()
        if self._decoder_optimiser is not None:
            self._descend_decoders()
        return found.kl

    def _noise(self) -> torch.Generator:
        """A function of seed and step, so that nothing of it has to be kept."""
        # torch takes no more than 32 bits of a seed
        state = np.random.SeedSequence((self.hyperparameters.seed, self.steps_done)).generate_state(1)
        return torch.Generator().manual_seed(int(state[0]))

    def _step_of_decoders(self, batch: Sequence[SequenceCodes], pool: ThreadPoolExecutor) -> float:
        found = mask_gradient(self.transcoder, self.layer, batch, self.kept, np.ones(len(self.kept), np.float32), pool)
        self._descend_decoders()
        return found.kl

    def _descend_decoders(self) -> None:
        factor = _rate(self.steps_done / self.steps)
        _descend(self._decoder_optimiser, self.hyperparameters.decoder_learning_rate * factor)


def _rate(progress: float) -> float:
    return min(1.0, (1 - progress) / (1 - CONSTANT_SHARE))


def _descend(optimiser: torch.optim.Adam, learning_rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = learning_rate
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
