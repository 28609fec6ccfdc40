"""Shards of activation caches on a node's own disk: copied once, read by all packs of the node, within a limit.

On a shared file system every batch would otherwise cross the network. A copy is made when a shard is first read. Where
that would pass the limit, the parts (a cache's tokens, or a layer of it) used longest ago give way as wholes, but for
those that a process has open. What cannot be copied (no room, a disk that gives out) is read where it is, if it can be.
"""

import fcntl
import hashlib
import logging
import os
import shutil
from io import TextIOWrapper
from pathlib import Path
from typing import Protocol

from torch import Tensor

from qkmodel.activations import Shard, map_shard
from qkmodel.errors import InputError
from qkmodel.files import PARTIAL_SUFFIX, exclusive

_log = logging.getLogger(__name__)
LOCK, TOTAL, HELD = "lock", "total", "held"
HASH_DIGITS = 16


class Originals(Protocol):
    """Where shards come from."""

    def size(self, original: Path) -> int:
        """Bytes of a shard. Raises OSError."""

    def copy(self, original: Path, to: Path) -> None:
        """Makes the file `to`. Raises OSError."""

    def map_uncopied(self, original: Path, reason: str, error: OSError | None = None) -> Tensor:
        """The tensor of a shard that could not be copied, for a reason in words. Raises where it cannot be read.

        `error` is what that says, where there was one.
        """


class SharedOriginals:
    """Files on a file system that all nodes share."""

    def size(self, original: Path) -> int:
        return original.stat().st_size

    def copy(self, original: Path, to: Path) -> None:
        shutil.copyfile(original, to)

    def map_uncopied(self, original: Path, reason: str, error: OSError | None = None) -> Tensor:
        _log.warning("%s; %s is read where it is", reason, original)
        return map_shard(original)


class NodeCopies:
    """The copies below `root`, of at most `max_bytes` together, whichever caches they are of."""

    def __init__(self, root: Path, max_bytes: int, originals: Originals | None = None) -> None:
        """`originals` is where shards come from: left out, a shared file system."""
        self._root = root
        self._max_bytes = max_bytes
        self._originals = originals or SharedOriginals()
        # locked, so that nobody deletes what is mapped here
        self._held: dict[Path, TextIOWrapper] = {}

    def map(self, original: Path, name: str, shard: Shard) -> Tensor:
        """The tensor of the shard at `original`, from its copy, which is made where there is none.

        `name` is that of the copy: cache, part and file. Raises InputError where the original is not what `shard` says,
        and as `map_shard`.
        """
        # with the hash: a shard that was lost and built again by another CPU may differ in its last bits
        copy = (self._root / name).with_stem(f"{Path(name).stem}-{shard.sha256[:HASH_DIGITS]}")
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            with exclusive(self._root / LOCK, lambda _: None):
                self._hold(copy.parent)
                lack = None if copy.exists() else self._make(copy, original, shard)
                if lack is None:
                    return map_shard(copy)
        except OSError as error:
            return self._originals.map_uncopied(original, f"{self._root}: {error.strerror or error}", error)
        return self._originals.map_uncopied(original, lack)

    def _hold(self, part: Path) -> None:
        if part not in self._held:
            part.mkdir(parents=True, exist_ok=True)
            self._held[part] = (part / HELD).open("a")
            fcntl.flock(self._held[part], fcntl.LOCK_SH)
            os.utime(part / HELD)

    def _make(self, copy: Path, original: Path, shard: Shard) -> str | None:
        """What there was no room for, in words."""
        size = self._originals.size(original)
        if not self._make_room(size):
            return f"{self._root}: no room for {size} bytes"
        partial = copy.with_name(f"{copy.name}{PARTIAL_SUFFIX}")
        # what a kill left there may be an original under another name, which a copy would be written over
        partial.unlink(missing_ok=True)
        try:
            self._originals.copy(original, partial)
            with partial.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard.sha256:
                raise InputError(f"{original}: damaged shard; start the sweep again to rebuild it")
            os.replace(partial, copy)
        finally:
            partial.unlink(missing_ok=True)
        return None

    def _make_room(self, size: int) -> bool:
        """Whether `size` more bytes fit, which then count; parts are deleted where that helps."""
        total = self._total()
        if total + size > self._max_bytes:
            parts = {held.parent: held.stat().st_mtime_ns for held in self._root.glob(f"*/*/{HELD}")}
            sizes = {part: _size(part) for part in parts}
            total = sum(sizes.values())
            for part in sorted(parts, key=parts.get):
                if total + size > self._max_bytes and _is_free(part):
                    shutil.rmtree(part)
                    total -= sizes[part]
        fits = total + size <= self._max_bytes
        (self._root / TOTAL).write_text(str(total + size if fits else total))
        return fits

    def _total(self) -> int:
        """What copies take by the last count: adding up thousands of files for each new one would take too long."""
        try:
            return int((self._root / TOTAL).read_text())
        except (FileNotFoundError, ValueError):
            return sum(_size(held.parent) for held in self._root.glob(f"*/*/{HELD}"))


def _size(part: Path) -> int:
    return sum(file.stat().st_size for file in part.iterdir())


def _is_free(part: Path) -> bool:
    """Whether no process holds it."""
    with (part / HELD).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
