"""A pack of masks: trainings of one layer in lockstep on shared batches.

Members of one dictionary share its activations on every batch. They take turns, and a pack's threads take different
heads of one member, so that neither the pack nor the number of threads changes any result.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from qkmodel.activation_stream import StreamedActivations
from qkmodel.activations import ActivationCache
from qkmodel.allocator import give_back_memory, keep_freed_memory
from qkmodel.attention import AttentionLayer
from qkmodel.configs import TrainingConfig
from qkmodel.lockstep import Lockstep
from qkmodel.pair_mask.hyperparameters import MaskHyperparameters
from qkmodel.pair_mask.saliency import SalientPairs
from qkmodel.pair_mask.score_terms import sequence_codes
from qkmodel.pair_mask.training import Batch, MaskTrainer
from qkmodel.transcoder import QKTranscoder


@dataclass(frozen=True)
class MaskSource:
    """A dictionary whose pairs are masked, and which of them may be kept."""

    transcoder: QKTranscoder
    candidates: SalientPairs


class MaskPackTrainer(Lockstep):
    """Trains masks; `members` may be taken out of the list between two calls of `train`.

    `sources` by the name that hyperparameters have for a dictionary.
    """

    def __init__(
        self,
        members: Sequence[MaskHyperparameters],
        sources: Mapping[str, MaskSource],
        layer: AttentionLayer,
        cache: ActivationCache | StreamedActivations,
        training: TrainingConfig,
        seed: int,
        threads: int = 1,
    ) -> None:
        super().__init__(layer, cache, training, seed)
        self.sources = sources
        self.threads = threads
        self.members = [self._trainer(one) for one in members]

    def _trainer(self, hyperparameters: MaskHyperparameters) -> MaskTrainer:
        source = self.sources[hyperparameters.dictionary]
        return MaskTrainer(hyperparameters, source.transcoder, self.layer, source.candidates.pairs, self.steps_planned)

    def pool(self) -> ThreadPoolExecutor:
        """Threads that take different heads, each with single-threaded arithmetic."""
        return ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))

    def train(self, steps: int, may_go_on: Callable[[], bool] = lambda: True) -> None:
        """Trains every member for `steps` further steps, or until the training's end.

        `may_go_on` is asked before every step; a no leaves the members whole, after their last one.
        """
        last = min(self.steps_done + steps, self.steps_planned)
        # of what streams its activations
        keep_freed_memory()
        with self.pool() as pool:
            while self.steps_done < last and may_go_on():
                batches = self._batches(self.steps_done)
                for member in self.members:
                    member.step(batches[member.hyperparameters.dictionary], pool)
                self.steps_done += 1
        give_back_memory()

    def _batches(self, step: int) -> dict[str, Batch]:
        """For every dictionary that a member still masks."""
        x = self.cache.read(self.layer.geometry.layer, "train", self.sequences_of(step))
        names = {member.hyperparameters.dictionary for member in self.members}
        return {name: Batch(x, sequence_codes(self.sources[name].transcoder, self.layer, x)) for name in names}
