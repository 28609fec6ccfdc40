"""What a sweep file comes to: places, sizes of trainings, sampler, halving."""

import math
from collections.abc import Sequence
from pathlib import Path

from orchestrator.config import PackResources, SweepConfig
from orchestrator.search.config import resolve_halving
from orchestrator.search.halving import Halving
from orchestrator.search.samplers import resolve_auto
from orchestrator.search.space import Alternative
from orchestrator.storage.opened import local_root


def sampler_for(config: SweepConfig, space: Sequence[Alternative]) -> str:
    """The sampler by name, `auto` resolved for a study's space."""
    search = config.search
    return resolve_auto(space, search.trainings) if search.sampler == "auto" else search.sampler


def tokens_per_step(config: SweepConfig) -> int:
    return config.training.batch_sequences * config.corpus.context


def steps_per_training(config: SweepConfig) -> int:
    return math.ceil(config.training.tokens / tokens_per_step(config))


def tokens_per_training(config: SweepConfig) -> int:
    """`training.tokens` rounded up to whole batches."""
    return steps_per_training(config) * tokens_per_step(config)


def halving_of(config: SweepConfig) -> Halving | None:
    """Where trainings may be stopped early; None where all are trained to their end.

    Masks are: one keeps few pairs only at its end.
    """
    if config.task == "pair_mask":
        return None
    trainings, steps = config.search.trainings, steps_per_training(config)
    sampler = sampler_for(config, config.search.space)
    return resolve_halving(config.halving, sampler, trainings, steps, tokens_per_step(config))


def packs_at_once(cpus: float, gpus: float, pack: PackResources) -> int:
    """How many packs one machine holds."""
    # 0.3 / 0.1 is a little less than 3
    packs = math.floor(cpus / pack.cpu + 1e-9)
    return min(packs, math.floor(gpus) * packs_on_a_gpu(pack)) if pack.gpu > 0 else packs


def packs_on_a_gpu(pack: PackResources) -> int:
    """Packs that one GPU takes at once; 0 where they train on CPUs."""
    return math.floor(1 / pack.gpu + 1e-9) if pack.gpu > 0 else 0


def sweep_folder(config: SweepConfig) -> Path:
    return storage_folder(config) / config.name


def storage_folder(config: SweepConfig) -> Path:
    """Where sweep folders, activation caches and MLflow's default store lie on this machine."""
    return local_root(config.storage)
