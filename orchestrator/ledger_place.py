"""Where a sweep's ledger is: what its file says, and what its folder says."""

from pathlib import Path

from orchestrator.addresses import require_ledger_address
from orchestrator.config import SweepConfig
from orchestrator.ledger_connection import Place
from orchestrator.ledger_file import LEDGER_FILE, SqliteFile
from orchestrator.ledger_pointer import POINTER_FILE, LedgerPointer
from orchestrator.ledger_postgres import SweepSchema, schema_name
from qkmodel.errors import InputError


def place_of(config: SweepConfig, folder: Path, reading: bool = False) -> Place:
    """The ledger of the sweep in `folder` that a file describes, there or to come.

    A driver's file has to say where the ledger is; to read it, the folder will do. Raises InputError where file and
    folder disagree.
    """
    address = config.ledger
    if address is None and reading:
        return place_in(folder)
    pointer = _pointer(folder)
    if address is None:
        if pointer is not None:
            raise InputError(f"ledger: the sweep in {folder} has its ledger at {pointer.address}; write that")
        return SqliteFile(folder / LEDGER_FILE)
    if (folder / LEDGER_FILE).exists():
        raise InputError(
            f"ledger: the sweep in {folder} has its ledger in {LEDGER_FILE} there; leave the key out, or give the "
            "sweep another name"
        )
    return SweepSchema(address, schema_name(config.name), folder, pointer, reading)


def place_in(folder: Path) -> Place:
    """The ledger, to be read, of the sweep in a folder. Raises InputError when the folder's word cannot be read."""
    pointer = _pointer(folder)
    if pointer is None:
        return SqliteFile(folder / LEDGER_FILE)
    return SweepSchema(pointer.address, pointer.schema, folder, pointer, reading=True)


def is_begun(folder: Path) -> bool:
    """Whether a driver has begun a sweep in the folder."""
    return any((folder / name).exists() for name in (LEDGER_FILE, POINTER_FILE))


def _pointer(folder: Path) -> LedgerPointer | None:
    pointer = LedgerPointer.read(folder)
    if pointer is not None:
        try:
            require_ledger_address(pointer.address)
        except InputError as error:
            raise InputError(f"{folder / POINTER_FILE}: {error}") from error
    return pointer
