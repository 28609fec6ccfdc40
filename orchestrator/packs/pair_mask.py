"""A pack of pair masks (step 2)."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from orchestrator.packs.inputs import BRIEF_SEQUENCES, Metrics, PackInputs
from orchestrator.versions import git_sha, package_versions
from qkmodel.dictionary import DictionaryConfig, PairMaskConfig, load_dictionary, save_dictionary
from qkmodel.evaluation import evaluate_cross_entropy
from qkmodel.pair_mask.candidates import SplitCodes, read_candidates
from qkmodel.pair_mask.evaluation import evaluate_mask, mask_kl, masked_pattern, unmasked_kl
from qkmodel.pair_mask.kept_pairs import KeptPairs
from qkmodel.pair_mask.pack import MaskPackTrainer, MaskSource
from qkmodel.pair_mask.shares import PairShares
from qkmodel.pair_mask.training import MaskTrainer
from qkmodel.transcoder import QKTranscoder


class MaskPack:
    """See `Pack`."""

    def __init__(self, inputs: PackInputs) -> None:
        self._inputs = inputs
        order = inputs.order
        named = {member.hyperparameters.dictionary for member in order.members}
        self._orders = {name: order.sources[name] for name in named}
        self._dictionaries = {name: load_dictionary(one.folder, one.sha256) for name, one in self._orders.items()}
        sources = {
            name: MaskSource(
                self._dictionaries[name].transcoder,
                read_candidates(one.candidates, one.sha256, one.calibration_sequences),
            )
            for name, one in self._orders.items()
        }
        self.trainer = MaskPackTrainer(
            [member.hyperparameters for member in order.members],
            sources,
            inputs.layer,
            inputs.training_data,
            order.training,
            order.seed,
            inputs.threads,
        )
        # by member, of the latest evaluation
        self._shares: list[PairShares] = []

    def evaluate(self) -> list[Metrics]:
        self._shares = []
        with self.trainer.pool() as pool:
            if self.trainer.finished:
                return [self._final(member, pool) for member in self.trainer.members]
            return [self._brief(member, pool) for member in self.trainer.members]

    def _brief(self, member: MaskTrainer, pool: ThreadPoolExecutor) -> Metrics:
        """With the pairs that would be kept if the choice were made now."""
        inputs, chosen = self._inputs, member.chosen()
        sequences = min(BRIEF_SEQUENCES, inputs.order.training.validation_sequences)
        codes = SplitCodes(member.transcoder, inputs.layer, inputs.cache, "validation", sequences)
        kl = mask_kl(member.transcoder, inputs.layer, codes, chosen, pool)
        recovered = 1 - kl / inputs.reference.kl_baseline
        return {"kl_masked": kl, "kl_masked_recovered": recovered, "pairs_kept": float(len(chosen))}

    def _final(self, member: MaskTrainer, pool: ThreadPoolExecutor) -> Metrics:
        inputs, training, layer = self._inputs, self._inputs.order.training, self._inputs.layer
        source = self.trainer.sources[member.hyperparameters.dictionary]

        def codes(transcoder: QKTranscoder) -> SplitCodes:
            return SplitCodes(transcoder, layer, inputs.cache, "validation", training.validation_sequences)

        of_source = (
            unmasked_kl(source.transcoder, layer, codes(source.transcoder)) if member.hyperparameters.joint else None
        )
        salient, of_member = source.candidates.salient, codes(member.transcoder)
        metrics, shares = evaluate_mask(member.transcoder, layer, of_member, member.kept, salient, pool, of_source)
        self._shares.append(shares)
        baseline = inputs.reference.kl_baseline
        metrics |= {
            "kl_baseline": baseline,
            "kl_recovered": 1 - metrics["kl"] / baseline,
            "kl_masked_recovered": 1 - metrics["kl_masked"] / baseline,
        }
        if training.patched_sequences == 0:
            return metrics
        pattern = partial(masked_pattern, member.transcoder, layer, member.kept, pool)
        (patched,) = evaluate_cross_entropy(
            [pattern], layer, inputs.load_model(), inputs.cache, inputs.reference, training.patched_sequences
        )
        return metrics | patched

    def save(self, index: int, training_id: str, metrics: Metrics, folder: Path) -> str:
        order, member = self._inputs.order, self.trainer.members[index]
        name = member.hyperparameters.dictionary
        source, candidates = self._dictionaries[name], self.trainer.sources[name].candidates
        mask = PairMaskConfig(
            hyperparameters=member.hyperparameters,
            source_sha256=self._orders[name].sha256,
            training=order.training,
            candidates=len(candidates.pairs),
            salient=candidates.salient,
            calibration_sequences=self._orders[name].calibration_sequences,
        )
        config = DictionaryConfig(
            training_id=training_id,
            model=order.model_identity,
            geometry=self._inputs.layer.geometry,
            corpus=order.corpus_identity,
            training=source.config.training,
            sweep_seed=order.seed,
            hyperparameters=source.config.hyperparameters,
            metrics=metrics,
            pair_mask=mask,
            versions=package_versions(),
            git_sha=git_sha(),
        )
        kept = KeptPairs.of(member.kept, self._shares[index])
        return save_dictionary(folder, member.transcoder, self._inputs.layer, config, kept)
