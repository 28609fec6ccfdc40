"""What all packs have in common: trainings of one layer that go through the same batches in lockstep."""

import numpy as np

from qkmodel.activation_stream import StreamedActivations
from qkmodel.activations import ActivationCache
from qkmodel.attention import AttentionLayer
from qkmodel.configs import TrainingConfig
from qkmodel.data_order import batch_sequences, sequences_per_epoch


class Lockstep:
    """Where a pack stands in its data; `tokens_done` counts the tokens that each member has seen."""

    def __init__(
        self, layer: AttentionLayer, cache: ActivationCache | StreamedActivations, training: TrainingConfig, seed: int
    ) -> None:
        self.layer = layer
        self.cache = cache
        self.training = training
        self.seed = seed
        self.steps_done = 0

    @property
    def tokens_per_step(self) -> int:
        return self.training.batch_sequences * self.cache.context

    @property
    def tokens_done(self) -> int:
        return self.steps_done * self.tokens_per_step

    @property
    def steps_planned(self) -> int:
        """Steps of a whole training: `training.tokens` rounded up to whole batches."""
        return -(-self.training.tokens // self.tokens_per_step)

    @property
    def finished(self) -> bool:
        return self.steps_done >= self.steps_planned

    def sequences_of(self, step: int) -> np.ndarray:
        """The numbers of the training sequences that a step reads."""
        available = sequences_per_epoch(self.training, self.cache.context, self.cache.train_sequences_available)
        return batch_sequences(step, self.training.batch_sequences, available, self.seed)
