"""The activation cache that holds the text a study, or a dictionary, was measured on."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.ledger_records import Study
from orchestrator.storage.shared import SHARED, Storage
from orchestrator.storage_check import CACHE_FOLDER
from orchestrator.stored_cache import StoredCache
from qkmodel.activations import SHARD_SEQUENCES, ActivationCache, layer_part, read_manifest, shard_path
from qkmodel.dictionary import DictionaryConfig
from qkmodel.errors import InputError


def cache_of_study(root: Path, study: Study, storage: Storage = SHARED) -> ActivationCache:
    """The one with the study's validation sequences, of those at `root`. Raises InputError when there is none."""
    identity, corpus = study.identity, study.identity.get("corpus", {})
    wanted = {name: identity.get(name) for name in ("weights_sha256", "tokenizer_sha256", "dtype", "seed")}
    wanted |= {name: corpus.get(name) for name in ("bos", "context", "validation_documents")}
    return _find(root, study.layer, wanted | {"corpus_sha256": corpus.get("sha256")}, 1, storage)


def cache_of_dictionary(
    root: Path, config: DictionaryConfig, sequences: int, storage: Storage = SHARED
) -> ActivationCache:
    """The one with so many validation sequences of the corpus that it was trained on. Raises InputError when none is.

    A sweep with another element type may have left a cache of fewer beside it.
    """
    corpus = config.corpus
    wanted = {
        "weights_sha256": config.model.weights_sha256,
        "corpus_sha256": corpus.sha256,
        "bos": corpus.bos,
        "context": corpus.config.context,
        "validation_documents": corpus.config.validation_documents,
        "seed": config.sweep_seed,
    }
    return _find(root, config.model.layer, wanted, sequences, storage)


def _find(root: Path, layer: int, wanted: Mapping[str, Any], sequences: int, storage: Storage) -> ActivationCache:
    """Caches are looked through instead of one being named: which element type products have is a machine's choice."""
    last = shard_path(layer_part(layer), "validation", (sequences - 1) // SHARD_SEQUENCES)
    for folder in (root / CACHE_FOLDER / name for name in storage.names(root / CACHE_FOLDER)):
        # what is no cache, or one of another version, is not the one that is looked for
        with contextlib.suppress(InputError):
            stored = StoredCache(folder, storage)
            stored.refresh()
            manifest = read_manifest(folder)
            if manifest is None or last not in manifest.shards:
                continue
            key = manifest.key.model_dump()
            if all(key[name] == value for name, value in wanted.items()):
                return ActivationCache(folder, manifest, stored.copies)
    where = storage.shown(root / CACHE_FOLDER)
    raise InputError(f"{where} has no activations of it; start the sweep again to have them built")
