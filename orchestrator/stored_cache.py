"""An activation cache in a sweep's storage: fetched for what is wanted of it, and sent as it grows.

In a shared folder all of this is nothing. Of a bucket's cache the local manifest lists what is in the bucket and what
was built here; of the shards that it lists only those that were fetched or built are on this machine.
"""

import hashlib
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from orchestrator.storage.bucket import Bucket, is_copy
from orchestrator.storage.shared import Storage
from qkmodel.activation_request import CacheRequest
from qkmodel.activations import MANIFEST, SPLITS, Manifest, Shard, map_shard, parse_manifest, read_manifest, shard_path
from qkmodel.files import write_atomically

# while a cache is built, so that a machine that is lost then takes little with it
SENDING_SECONDS = 60.0
_AT_ONCE = 8


class StoredCache:
    """The cache in `folder`, of `storage`."""

    def __init__(self, folder: Path, storage: Storage) -> None:
        self._folder = folder
        self._storage = storage
        self._sent_at = time.monotonic()

    @property
    def copies(self) -> "FetchedShards | None":
        """For reading the cache while not all that its manifest lists is here."""
        return FetchedShards(self._storage) if self._storage.url is not None else None

    def refresh(self) -> None:
        """Has the local manifest list what the storage has. Raises InputError for one that cannot be read."""
        stored = self._stored_manifest()
        if stored is None:
            return
        built = read_manifest(self._folder)
        if built is not None:
            stored = stored.model_copy(update={"shards": built.shards | stored.shards}).with_available(built.available)
        if stored != built:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._folder / MANIFEST, stored.model_dump_json(indent=1).encode())

    def fetch(self, request: CacheRequest) -> None:
        """Has those shards of a request lie here that the storage has. What is damaged is for the build to find."""
        manifest = read_manifest(self._folder)
        if not isinstance(self._storage, Bucket) or manifest is None:
            return
        listed = self._storage.listing(self._folder)
        wanted = [self._folder / path for path in _needed(manifest, request) if path in manifest.shards]
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            list(threads.map(lambda path: self._storage.fetch(path, listed[path]), (p for p in wanted if p in listed)))

    def send(self) -> None:
        """Has the storage hold what was built here: shards that it lacks or has otherwise, and then the manifest."""
        manifest = read_manifest(self._folder)
        if not isinstance(self._storage, Bucket) or manifest is None:
            return
        listed = self._storage.listing(self._folder)
        here = {self._folder / path: shard for path, shard in manifest.shards.items() if (self._folder / path).exists()}
        other = [path for path in here if path not in listed or not is_copy(path, listed[path])]
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            # what nobody asked for now was not compared: it may be older than what another machine sent since
            intact = threads.map(lambda path: _is_intact(path, here[path]), other)
            new = [path for path, is_intact in zip(other, intact, strict=True) if is_intact]
            list(threads.map(self._storage.send, new))
        # another driver may have sent others since
        stored = self._stored_manifest() or Manifest.empty(manifest.key)
        sent = listed.keys() - other | {*new}
        there = {path: shard for path, shard in manifest.shards.items() if self._folder / path in sent}
        whole = stored.model_copy(update={"shards": dict(sorted((stored.shards | there).items()))})
        whole = whole.with_available(manifest.available)
        if new or whole != stored:
            self._storage.write(self._folder / MANIFEST, whole.model_dump_json(indent=1).encode())
        self._sent_at = time.monotonic()

    def send_now_and_then(self) -> None:
        """Sends where the last time was long ago."""
        if time.monotonic() - self._sent_at >= SENDING_SECONDS:
            self.send()

    def _stored_manifest(self) -> Manifest | None:
        if self._storage.url is None:
            return None
        path = self._folder / MANIFEST
        content = self._storage.read(path)
        return None if content is None else parse_manifest(content, self._storage.shown(path))


class FetchedShards:
    """Shards that are fetched when they are first read: see `qkmodel.activations.Copies`."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def map(self, original: Path, name: str, shard: Shard) -> Tensor:
        self._storage.fetch(original)
        return map_shard(original)


def _is_intact(path: Path, shard: Shard) -> bool:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256


def _needed(manifest: Manifest, request: CacheRequest) -> Iterable[str]:
    for part in request.parts:
        for split in SPLITS:
            for index in range(len(manifest.needed(split, request.wanted(part)[split]))):
                yield shard_path(part, split, index)
