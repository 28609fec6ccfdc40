"""A pack of transcoders (step 1)."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from orchestrator.packs.inputs import BRIEF_SEQUENCES, Metrics, PackInputs
from orchestrator.versions import git_sha, package_versions
from qkmodel.dictionary import DictionaryConfig, save_dictionary
from qkmodel.evaluation import evaluate, evaluate_cross_entropy, reconstructed_pattern
from qkmodel.pack import PackTrainer
from qkmodel.transcoder import QKTranscoder

PROGRESS_METRICS = ("kl", "kl_recovered", "l0")


class TranscoderPack:
    """See `Pack`."""

    def __init__(self, inputs: PackInputs) -> None:
        self._inputs = inputs
        self.trainer = PackTrainer(
            [member.hyperparameters for member in inputs.order.members],
            inputs.layer,
            inputs.training_data,
            inputs.reference,
            inputs.order.training,
            inputs.order.seed,
            inputs.threads,
        )

    def evaluate(self) -> list[Metrics]:
        inputs, sequences = self._inputs, self._inputs.order.training.validation_sequences
        if not self.trainer.finished:
            sequences = min(BRIEF_SEQUENCES, sequences)
        transcoders = [member.transcoder for member in self.trainer.members]
        found = evaluate(transcoders, inputs.layer, inputs.cache, inputs.reference, sequences, inputs.order.threads)
        if self.trainer.finished:
            return [metrics | more for metrics, more in zip(found, self._cross_entropies(transcoders), strict=True)]
        return [{name: metrics[name] for name in PROGRESS_METRICS} for metrics in found]

    def _cross_entropies(self, transcoders: Sequence[QKTranscoder]) -> list[Metrics]:
        inputs, sequences = self._inputs, self._inputs.order.training.patched_sequences
        if sequences == 0:
            return [{} for _ in transcoders]
        patterns = [partial(reconstructed_pattern, transcoder, inputs.layer) for transcoder in transcoders]
        model, threads = inputs.load_model(), inputs.order.threads
        return evaluate_cross_entropy(patterns, inputs.layer, model, inputs.cache, inputs.reference, sequences, threads)

    def save(self, index: int, training_id: str, metrics: Metrics, folder: Path) -> str:
        order, member = self._inputs.order, self.trainer.members[index]
        config = DictionaryConfig(
            training_id=training_id,
            model=order.model_identity,
            geometry=self._inputs.layer.geometry,
            corpus=order.corpus_identity,
            training=order.training,
            sweep_seed=order.seed,
            hyperparameters=member.hyperparameters,
            metrics=metrics,
            versions=package_versions(),
            git_sha=git_sha(),
        )
        return save_dictionary(folder, member.transcoder, self._inputs.layer, config)
