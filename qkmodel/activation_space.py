"""How much room a request of the activation cache takes, and whether there is as much."""

import shutil
from pathlib import Path

from pydantic import ByteSize

from qkmodel.activation_request import CacheRequest, missing_work, request_bytes
from qkmodel.activations import SPLITS, Manifest
from qkmodel.errors import InputError


def refuse_without_room(root: Path, manifest: Manifest, request: CacheRequest, max_bytes: int) -> None:
    """Raises InputError when the request takes more than `max_bytes`, or what is missing more than is free at `root`.

    Writes nothing; `root` need not exist yet.
    """
    size = request_bytes(manifest, request)
    if size > max_bytes:
        sequences = sum(manifest.sequences_needed(split, request.activations[split]) for split in SPLITS)
        raise InputError(
            f"activations.max_bytes: {sequences} sequences of {manifest.key.context} tokens at "
            f"{len(request.layers)} layers, and all tokens, need {_readable(size)}, more than {_readable(max_bytes)}; "
            "raise it, or ask for fewer tokens, layers or validation sequences, or for a shorter context"
        )
    new = missing_work(manifest, request).bytes
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if new > free:
        raise InputError(
            f"{root}: the activation cache needs {_readable(new)} more and {_readable(free)} are "
            "free; make room, set storage to another disk, or lower activations.max_bytes: then packs compute "
            "training activations as they go"
        )


def _readable(size: int) -> str:
    return ByteSize(size).human_readable(decimal=True, separator=" ")
