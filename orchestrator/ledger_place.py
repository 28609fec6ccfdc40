"""Where a sweep's ledger is: what its file says, and what its folder says."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from orchestrator.addresses import require_ledger_address
from orchestrator.config import SweepConfig
from orchestrator.ledger_connection import Place
from orchestrator.ledger_file import LEDGER_FILE, SqliteFile
from orchestrator.ledger_pointer import POINTER_FILE, LedgerPointer
from orchestrator.ledger_postgres import SweepSchema, schema_name
from orchestrator.storage.address import is_bucket
from orchestrator.storage.opened import local_root, open_in_bucket, open_storage
from orchestrator.storage.shared import SHARED, Storage
from orchestrator.storage_check import check_bucket
from qkmodel.errors import InputError
from qkmodel.files import user_path


def place_of(config: SweepConfig, folder: Path, reading: bool = False) -> Place:
    """The ledger of the sweep in `folder` that a file describes, there or to come.

    A driver's file has to say where the ledger is; to read it, the folder will do. Raises InputError where file and
    folder disagree.
    """
    address, storage = config.ledger, open_storage(config.storage)
    if address is None and reading:
        return place_in(folder, storage)
    pointer = _pointer(folder, storage)
    if address is None:
        if pointer is not None:
            raise InputError(f"ledger: the sweep in {folder} has its ledger at {pointer.address}; write that")
        return SqliteFile(folder / LEDGER_FILE)
    if (folder / LEDGER_FILE).exists():
        raise InputError(
            f"ledger: the sweep in {folder} has its ledger in {LEDGER_FILE} there; leave the key out, or give the "
            "sweep another name"
        )
    schema = schema_name(config.name)
    if pointer is None and storage.url is not None:
        pointer = LedgerPointer(address, schema, _identity(storage.shown(folder)))
    return SweepSchema(address, schema, folder, pointer, reading, storage)


def place_in(folder: Path, storage: Storage = SHARED) -> Place:
    """The ledger, to be read, of the sweep in a folder. Raises InputError when the folder's word cannot be read."""
    pointer = _pointer(folder, storage)
    if pointer is None:
        return SqliteFile(folder / LEDGER_FILE)
    return SweepSchema(pointer.address, pointer.schema, folder, pointer, reading=True, storage=storage)


def named_places(key: str, name: str, config: SweepConfig) -> Iterator[Place]:
    """The ledgers that the name of a sweep may mean, which a person gave under `key`.

    An address in a bucket means one; anything else a folder, or else a sweep beside the one that `config` describes.
    Raises InputError.
    """
    if is_bucket(name):
        bucket, folder = open_in_bucket(name)
        check_bucket(bucket.url, is_written=False)
        yield place_in(folder, bucket)
        return
    yield place_in(user_path(key, name).absolute())
    yield place_in(local_root(config.storage) / name, open_storage(config.storage))


def shown_storage(config: SweepConfig) -> str:
    """Where a sweep is kept, for people."""
    return open_storage(config.storage).shown(local_root(config.storage))


def is_begun(folder: Path) -> bool:
    """Whether a driver has begun a sweep in the folder."""
    return any((folder / name).exists() for name in (LEDGER_FILE, POINTER_FILE))


def _identity(url: str) -> str:
    """That of the sweep at an address: two drivers that begin it at once, on two machines, draw the same."""
    return hashlib.sha256(url.encode()).hexdigest()[:32]


def _pointer(folder: Path, storage: Storage) -> LedgerPointer | None:
    pointer = LedgerPointer.read(folder, storage)
    if pointer is not None:
        try:
            require_ledger_address(pointer.address)
        except InputError as error:
            raise InputError(f"{storage.shown(folder / POINTER_FILE)}: {error}") from error
    return pointer
