"""How many trainings `pack: auto` puts into a pack, and how much memory a pack takes."""

import os
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from pydantic import ByteSize

from orchestrator.config import SweepConfig
from orchestrator.plan_figures import packs_on_a_gpu
from orchestrator.search.space import Alternative, extremes
from orchestrator.source_dictionaries import SourceDictionary
from qkmodel.attention import AttentionGeometry
from qkmodel.errors import InputError
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.model_description import ModelDescription
from qkmodel.pack_memory import ModelUse, masks_bytes, pack_bytes
from qkmodel.products import forward_products, product_dtype

# From here on what a pack shares is under a tenth of a step's cost (benchmarks/growth.py), and a larger pack would only
# report and adapt later: a search that learns from results wants them early.
LARGEST_PACK = 8
LARGEST_ADAPTIVE_PACK = 4
# The rest is for the driver, the page cache of activations, and what the model of memory does not see.
MEMORY_SHARE = 0.7
# the least that a GPU meant for training has today
UNSEEN_GPU_BYTES = 16 * 10**9
# What changes the cost of a training's step.
COSTLY = ("activation", "dictionary_size", "key_dictionary_size", "k", "key_k")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def kinds_of_training(space: Sequence[Alternative]) -> list[Hyperparameters]:
    """One training for each combination of what changes a step's cost, of ranges and lists both ends."""
    kinds = []
    for alternative in space:
        first = {name: extremes(name, setting)[0] for name, setting in alternative.items()}
        costly = {name: _ends(extremes(name, alternative[name])) for name in COSTLY if name in alternative}
        kinds += [
            Hyperparameters(**first | dict(zip(costly, chosen, strict=True))) for chosen in product(*costly.values())
        ]
    return kinds


def _ends(found: list[Any]) -> list[Any]:
    """Least and largest number, or every word."""
    return found if isinstance(found[0], str) else sorted({min(found), max(found)})


def memory_of_pack(config: SweepConfig, model: ModelDescription, size: int, streamed: bool) -> int:
    """Bytes of a pack of `size` trainings of the largest kind, and of the language model if it runs that.

    It does for cross-entropies, and where it is `streamed` for every batch.
    """
    threads, batch = max(1, int(config.resources.pack.cpu)), config.training.batch_sequences
    geometry, device = geometry_of(model), "cuda" if config.resources.pack.gpu > 0 else "cpu"
    products = product_dtype(config.training.precision, torch.device(device))
    patched = config.training.patched_sequences > 0
    use = ModelUse(model, forward_products(config.activations.dtype), streamed, patched)
    needed = use if streamed or patched else None
    return max(
        pack_bytes([kind] * size, geometry, batch, config.corpus.context, threads, device, needed, products)
        for kind in kinds_of_training(config.search.space)
    )


def automatic_pack_size(
    config: SweepConfig,
    model: ModelDescription,
    trainings: int,
    per_layer: int,
    slots: int,
    adaptive: bool,
    streamed: bool,
) -> int:
    """Enough packs to fill the machine's `slots`, none larger than pays, and all of them together within memory."""
    limit = min(LARGEST_ADAPTIVE_PACK if adaptive else LARGEST_PACK, per_layer, -(-trainings // slots))
    available = MEMORY_SHARE * device_memory(config) / min(slots, packs_on_a_gpu(config.resources.pack) or slots)
    size = max(1, limit)
    while size > 1 and memory_of_pack(config, model, size, streamed) > available:
        size -= 1
    return size


def memory_of_masks(
    config: SweepConfig, model: ModelDescription, sources: Sequence[SourceDictionary], size: int, streamed: bool
) -> int:
    """Bytes of a pack of `size` masks of the largest dictionary, and of the language model if it runs that."""
    patched, products = config.training.patched_sequences > 0, forward_products(config.activations.dtype)
    use = ModelUse(model, products, streamed, patched) if streamed or patched else None
    geometry, batch = geometry_of(model), config.training.batch_sequences
    return max(
        masks_bytes(
            [source.candidates(config.pair_mask.candidates)] * size,
            source.config.hyperparameters,
            geometry,
            batch,
            config.corpus.context,
            use,
        )
        for source in sources
    )


def check_memory(config: SweepConfig, model: ModelDescription, size: int, needed: int, streamed: bool) -> None:
    """Refuses packs of which not even one fits: it would end in the middle of a training. Raises InputError."""
    available = device_memory(config)
    if needed <= available:
        return
    if config.task == "pair_mask":
        key, smaller = "pair_mask.candidates", "fewer candidates"
    elif _is_mostly_context(config, model, size, needed, streamed):
        key, smaller = "corpus.context", "shorter sequences"
    else:
        key, smaller = "search.space.dictionary_size", "smaller dictionaries or batches"
    if size > 1:
        key, smaller = "pack", f"fewer trainings in a pack, or {smaller}"
    raise InputError(
        f"{key}: a pack of {size} takes about {_readable(needed)} of memory, and there are {_readable(available)}; "
        f"ask for {smaller}"
    )


def _is_mostly_context(config: SweepConfig, model: ModelDescription, size: int, needed: int, streamed: bool) -> bool:
    """Whether sequences of half the length would take less than half the memory."""
    corpus = config.corpus.model_copy(update={"context": config.corpus.context // 2})
    return memory_of_pack(config.model_copy(update={"corpus": corpus}), model, size, streamed) < needed / 2


def _readable(size: int) -> str:
    return ByteSize(size).human_readable(decimal=True, separator=" ")


def device_memory(config: SweepConfig) -> int:
    """Bytes of what a pack is on: this machine's memory, or that of the smallest GPU, since it may get any of them.

    Of a GPU that only the cluster has, `UNSEEN_GPU_BYTES` are counted on.
    """
    if config.resources.pack.gpu > 0:
        gpus = range(torch.cuda.device_count())
        return min((torch.cuda.get_device_properties(one).total_memory for one in gpus), default=UNSEEN_GPU_BYTES)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(memory, int(_CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):
        # no container, or one without a limit
        return memory


def geometry_of(model: ModelDescription) -> AttentionGeometry:
    """The shapes of any of the model's layers, without a window: not all of them may have it."""
    return AttentionGeometry(
        architecture="random",
        layer=0,
        d_model=model.d_model,
        n_heads=model.n_heads,
        n_kv_heads=model.n_kv_heads,
        d_head=model.d_head,
        rotary_dim=model.d_head // 2 * 2,
        scale=model.d_head**-0.5,
        soft_cap=model.soft_cap,
    )
