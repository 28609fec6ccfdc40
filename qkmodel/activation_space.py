"""How much room a request of the activation cache takes, and whether there is as much."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ByteSize

from qkmodel.activations import SPLITS, Manifest, Split, cache_bytes, missing_work
from qkmodel.errors import InputError


def request_bytes(manifest: Manifest, layers: Sequence[int], wanted: Mapping[Split, int]) -> int:
    """Bytes on disk of `wanted` sequences at `layers`, those that are there already included.

    An upper bound while `manifest` does not know how many sequences the corpus has.
    """
    return cache_bytes(manifest.key, layers, _sequences(manifest, wanted))


def refuse_without_room(
    root: Path, manifest: Manifest, layers: Sequence[int], wanted: Mapping[Split, int], max_bytes: int
) -> None:
    """Raises InputError when the request takes more than `max_bytes`, or what is missing more than is free at `root`.

    Writes nothing; `root` need not exist yet.
    """
    size = request_bytes(manifest, layers, wanted)
    if size > max_bytes:
        raise InputError(
            f"activations.max_bytes: {_sequences(manifest, wanted)} sequences of {manifest.key.context} tokens at "
            f"{len(layers)} layers need {_readable(size)}, more than {_readable(max_bytes)}; raise it, or ask for "
            "fewer tokens or layers"
        )
    new = missing_work(manifest, layers, wanted).bytes
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if new > free:
        raise InputError(
            f"{root}: the activation cache needs {_readable(new)} more and {_readable(free)} are "
            "free; make room, set storage to another disk, or ask for fewer tokens or layers"
        )


def _sequences(manifest: Manifest, wanted: Mapping[Split, int]) -> int:
    return sum(manifest.sequences_needed(split, wanted[split]) for split in SPLITS)


def _readable(size: int) -> str:
    return ByteSize(size).human_readable(decimal=True, separator=" ")
