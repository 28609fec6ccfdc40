"""What must be on disk before the first pack: the activation cache and the layers' references."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from orchestrator.config import SweepConfig
from orchestrator.plan import SweepPlan, machine_cpus
from qkmodel.activation_build import BuildProgress, build_activation_cache, refuse_beyond
from qkmodel.activations import ActivationCache, read_manifest, shard_sizes
from qkmodel.corpus import TokenisedCorpus, tokenise
from qkmodel.errors import InputError
from qkmodel.reference import LayerReference, ensure_reference, reference_path

if TYPE_CHECKING:
    from qkmodel.language_model import LanguageModel


@dataclass(frozen=True)
class Preparation:
    """Paths and figures that packs are ordered with; `references` by layer."""

    cache: ActivationCache
    references: dict[int, LayerReference]
    reference_files: dict[int, Path]


def model_loader(config: SweepConfig, say: Callable[[str], None]) -> "Callable[[], LanguageModel]":
    """Loads the sweep's model at the first call, and gives the same one at every further call."""

    @cache
    def load() -> "LanguageModel":
        # transformers and transformer_lens take seconds to import; a prepared sweep does without
        from qkmodel.language_model import load_language_model

        say(f"loading {config.model.name}")
        return load_language_model(config.model)

    return load


def prepare(
    plan: SweepPlan,
    load_model: "Callable[[], LanguageModel]",
    say: Callable[[str], None],
    progress: Callable[[BuildProgress], None],
) -> Preparation:
    """Makes sure that everything the plan's packs read is on disk.

    `load_model` is called only when something is missing. `say` receives one line per stage, `progress` the state of
    the forward passes. Raises InputError as the stages do.
    """
    config = plan.config

    torch.set_num_threads(config.resources.activations.cpu or machine_cpus())

    @cache
    def corpus(train_sequences: int, validation_sequences: int) -> TokenisedCorpus:
        say(f"reading {config.corpus.name}")
        found = tokenise(
            config.corpus,
            load_model().tokenizer,
            seed=config.seed,
            bos=plan.bos,
            train_sequences=train_sequences,
            validation_sequences=validation_sequences,
        )
        _check_corpus(plan, found)
        return found

    if read_manifest(plan.cache_root / plan.cache_key.folder_name) is None:
        # read now, so that what is wrong with it is said before anything is on disk
        corpus(*(sum(shard_sizes(wanted, None)) for wanted in (plan.train_sequences, plan.validation_sequences)))
    activations = build_activation_cache(
        plan.cache_root,
        plan.cache_key,
        layers=config.layers,
        train_sequences=plan.train_sequences,
        validation_sequences=plan.validation_sequences,
        max_bytes=config.activations.max_bytes,
        model_loader=load_model,
        corpus_loader=corpus,
        progress=progress,
    )
    references = {}
    for layer in config.layers:
        if not reference_path(activations, layer, config.training).exists():
            say(f"layer {layer}: proving its attention, measuring its baselines")
        _, references[layer] = ensure_reference(activations, layer, config.training, load_model)
    files = {layer: reference_path(activations, layer, config.training) for layer in config.layers}
    return Preparation(activations, references, files)


def _check_corpus(plan: SweepPlan, found: TokenisedCorpus) -> None:
    """Refuses what the corpus cannot give and what would not fit, while nothing is on disk yet."""
    held_out = found.validation.shape[0]
    if held_out < plan.validation_sequences:
        raise InputError(
            f"training.validation_sequences: {plan.validation_sequences}, but the held-out documents give only "
            f"{held_out}; ask for at most {held_out} or raise corpus.validation_documents"
        )
    config = plan.config
    refuse_beyond(config.activations.max_bytes, plan.cache_key, config.layers, found.train.shape[0] + held_out)
