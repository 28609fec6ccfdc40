"""The files that a pack reads and writes, wherever its sweep is kept."""

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from torch import Tensor

from orchestrator.pack_order import PackOrder, dictionary_path
from orchestrator.storage.bucket import Bucket
from orchestrator.storage.opened import local_root, open_storage
from orchestrator.storage.shared import SHARED, Storage, StorageGivesOut
from qkmodel.activations import MANIFEST, ActivationCache
from qkmodel.dictionary import CONFIG_FILE
from qkmodel.files import user_cache_folder
from qkmodel.node_copies import NodeCopies, Originals

# below the user's cache folder, where the sweep file names no place
SHARDS_FOLDER = "shards"


@dataclass(frozen=True)
class PackFiles:
    """An order with the paths of this node, and the storage that they are in."""

    order: PackOrder
    storage: Storage

    @classmethod
    def of(cls, order: PackOrder) -> Self:
        """What lies in a bucket is fetched when it is opened."""
        if order.bucket is None:
            return cls(order, SHARED)
        return cls(order.rebased(local_root(order.bucket.url)), open_storage(order.bucket.url))

    def open_cache(self) -> ActivationCache:
        """Fetches all that the pack reads besides checkpoints and shards, and opens the cache. Raises OSError."""
        order = self.order
        needed = [order.reference_file, order.cache_folder / MANIFEST]
        for name in {getattr(member.hyperparameters, "dictionary", None) for member in order.members} - {None}:
            needed += [order.sources[name].folder, order.sources[name].candidates]
        for path in needed:
            self.storage.fetch(path)
        return ActivationCache.open(order.cache_folder, self._copies())

    def hand_over(self, path: Path, last: str | None = None) -> None:
        """Returns once what was written to `path` is in the storage; nothing else of it is left on this node."""
        self.storage.send(path, last)
        self.storage.release(path)

    def drop_twins(self, training_id: str, sha256: str) -> None:
        """Removes the same dictionary of the same training where an earlier start's worker wrote it, or part of it.

        Its driver was gone before it heard of it, so no ledger names it. Raises OSError.
        """
        for start in range(1, self.order.start):
            folder = self.order.sweep_folder / dictionary_path(start, training_id)
            content = self.storage.read(folder / CONFIG_FILE)
            # written last: without it there never was a dictionary
            if content is None or hashlib.sha256(content).hexdigest() == sha256:
                self.storage.remove(folder)

    def _copies(self) -> NodeCopies | None:
        order = self.order.copies
        if order is None:
            return None
        originals = _StoredShards(self.storage) if isinstance(self.storage, Bucket) else None
        # `~` and the cache folder are this node's
        folder = order.folder.expanduser() if order.folder is not None else user_cache_folder() / SHARDS_FOLDER
        return NodeCopies(folder, order.max_bytes, originals)


class _StoredShards(Originals):
    """Shards in a bucket; on a machine that has copies of them, as the driver's has, these."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    def size(self, original: Path) -> int:
        return self._bucket.size(original)

    def copy(self, original: Path, to: Path) -> None:
        # where a sweep's driver ran once, the object may have been replaced since
        if not self._bucket.is_current(original):
            self._bucket.download(original, to)
            return
        try:
            # one file under two names takes its room once
            os.link(original, to)
        except OSError:
            shutil.copyfile(original, to)

    def map_uncopied(self, original: Path, reason: str, error: OSError | None = None) -> Tensor:
        if isinstance(error, StorageGivesOut):
            raise error
        raise StorageGivesOut(
            self._bucket.shown(original),
            f"{reason}, and a bucket's shards can be read from copies only (activations.node_folder, node_max_bytes)",
        )
