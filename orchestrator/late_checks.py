"""What only the model and its tokeniser can find wrong with a sweep, said while nothing is on disk yet."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from orchestrator.config import SweepConfig
from orchestrator.opening_token import AUTO, measure_opening_token
from orchestrator.plan import SweepPlan, make_plan
from orchestrator.plan_checks import machine_cpus
from qkmodel.activation_build import available_sequences
from qkmodel.activation_request import CacheRequest, missing_work
from qkmodel.activation_space import refuse_without_room
from qkmodel.activations import TOKENS, ActivationCache, Manifest
from qkmodel.attention_extraction import extract_attention_layer
from qkmodel.corpus import BosChoice, TokenisedCorpus, tokenise
from qkmodel.errors import InputError
from qkmodel.reference import checked_sequences, reference_path

if TYPE_CHECKING:
    from qkmodel.language_model import LanguageModel

# (training sequences, validation sequences) -> the corpus with so many, or with all that it has
CorpusReader = Callable[[int, int], TokenisedCorpus]


@dataclass(frozen=True)
class CheckedPlan:
    """A plan in which nothing was found wrong, and what was loaded to find that out.

    `measured` is the opening token's measurement, where one was needed and is not on disk yet. `manifest` is what the
    activation cache holds, with all that is known of the corpus's length, and `request` what it has to hold.
    `load_model` and `read_corpus` load at their first call and give the same afterwards.
    """

    plan: SweepPlan
    measured: BosChoice | None
    manifest: Manifest
    request: CacheRequest
    load_model: "Callable[[], LanguageModel]"
    read_corpus: CorpusReader


def check_plan(plan: SweepPlan, say: Callable[[str], None], stream: bool = True) -> CheckedPlan:
    """Refuses a corpus that gives too little, a cache without room, and attention that cannot be reproduced.

    Model and corpus are loaded only for what the activation cache does not hold. Without `stream` a data set on the
    hub is not read, and then none of this is known of it. Creates nothing. Raises InputError.
    """
    torch.set_num_threads(cache_threads(plan.config))
    load_model = _model_loader(plan, say)
    is_readable = stream or plan.corpus.documents is not None
    measured = None
    if plan.bos == AUTO and is_readable:
        measured = measure_opening_token(plan.config, load_model, say)
        plan = make_plan(plan.config, measured.bos, plan.fresh, plan.cluster_packs, plan.here)
    read_corpus = _corpus_reader(plan, load_model, say)
    manifest = plan.cached
    if plan.trainings_left and is_readable:
        manifest = _check_corpus(plan, manifest, read_corpus)
        _prove_attention(plan, load_model, read_corpus)
    return CheckedPlan(plan, measured, manifest, plan.cache_request(manifest), load_model, read_corpus)


def cache_threads(config: SweepConfig) -> int:
    """Threads that fill the activation cache."""
    return config.resources.activations.cpu or machine_cpus()


def _model_loader(plan: SweepPlan, say: Callable[[str], None]) -> "Callable[[], LanguageModel]":
    @cache
    def load() -> "LanguageModel":
        # transformers and transformer_lens take seconds to import; a prepared sweep does without
        from qkmodel.language_model import load_language_model

        say(f"loading {plan.config.model.name}")
        on_gpu = plan.config.resources.activations.gpu and plan.here
        return load_language_model(plan.config.model, "cuda" if on_gpu else "cpu")

    return load


def _corpus_reader(
    plan: SweepPlan, load_model: "Callable[[], LanguageModel]", say: Callable[[str], None]
) -> CorpusReader:
    @cache
    def read(train_sequences: int, validation_sequences: int) -> TokenisedCorpus:
        say(f"reading {plan.config.corpus.name}")
        return tokenise(
            plan.config.corpus,
            load_model().tokenizer,
            seed=plan.config.seed,
            bos=plan.bos,
            train_sequences=train_sequences,
            validation_sequences=validation_sequences,
        )

    return read


def _check_corpus(plan: SweepPlan, manifest: Manifest, read_corpus: CorpusReader) -> Manifest:
    """`manifest` with what reading the corpus has told, where it had to be read."""
    if manifest.missing_sequences([TOKENS], plan.sequences) > 0:
        found = read_corpus(*plan.sequences_in_shards)
        _check_held_out(plan, found)
        manifest = manifest.with_available(available_sequences(found))
    _check_calibration(plan, manifest)
    request = plan.cache_request(manifest)
    if missing_work(manifest, request).bytes > 0:
        refuse_without_room(plan.cache_root, manifest, request, plan.config.activations.max_bytes)
    return manifest


def _check_calibration(plan: SweepPlan, manifest: Manifest) -> None:
    available, masks = manifest.available["train"], plan.config.pair_mask
    if masks is not None and available is not None and masks.calibration_sequences > available:
        raise InputError(
            f"pair_mask.calibration_sequences: {masks.calibration_sequences}, but the corpus gives only {available} "
            "for training; ask for at most that"
        )


def _check_held_out(plan: SweepPlan, found: TokenisedCorpus) -> None:
    held_out = found.validation.shape[0]
    if held_out < plan.validation_sequences:
        raise InputError(
            f"training.validation_sequences: {plan.validation_sequences}, but the held-out documents give only "
            f"{held_out}; ask for at most {held_out} or raise corpus.validation_documents"
        )


def _prove_attention(plan: SweepPlan, load_model: "Callable[[], LanguageModel]", read_corpus: CorpusReader) -> None:
    """Hours of caching would otherwise come before the refusal of a layer that has no reference yet."""
    unproven = [layer for layer in plan.config.layers if not _has_reference(plan, layer)]
    if unproven:
        tokens = _first_validation_sequences(plan, read_corpus)
        for layer in unproven:
            extract_attention_layer(load_model(), layer, tokens)


def _has_reference(plan: SweepPlan, layer: int) -> bool:
    cache = ActivationCache(plan.cache_root / plan.cache_key.folder_name, plan.cached)
    return plan.storage.fetch(reference_path(cache, layer, plan.config.training))


def _first_validation_sequences(plan: SweepPlan, read_corpus: CorpusReader) -> Int[Tensor, "batch context"]:
    count = checked_sequences(plan.config.corpus.context, plan.validation_sequences)
    if plan.cached.missing_sequences([TOKENS], {"train": 0, "validation": count}) > 0:
        return read_corpus(*plan.sequences_in_shards).validation[:count].long()
    cache = ActivationCache.open(plan.cache_root / plan.cache_key.folder_name, plan.stored_cache.copies)
    return cache.tokens("validation", range(count))
