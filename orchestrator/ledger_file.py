"""Opening the ledger's file: SQLite, its format, and what makes a commit last."""

from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DatabaseError

from orchestrator.ledger_tables import Table
from qkmodel.errors import InputError

LEDGER_FILE = "ledger.sqlite"
SCHEMA_VERSION = 3
BUSY_TIMEOUT_SECONDS = 30


def create_or_open(path: Path) -> Engine:
    """The database at `path`; the file, its folder and its tables are made where missing.

    A creation that a kill cut off is completed. Raises InputError when the file is no ledger that this version reads.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    engine, version = _connect(path)
    if version == 0:
        with engine.begin() as connection:
            # readers are not blocked by the writer; a property of the file, so it is set once
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")
            Table.metadata.create_all(connection)
            # last, so that a file without it is known to be unfinished
            connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")
    return engine


def open_if_there(path: Path) -> Engine | None:
    """The database at `path`, None where there is none or a kill cut its creation off. Creates nothing.

    Raises InputError when the file is no ledger that this version reads.
    """
    if not path.is_file():
        return None
    engine, version = _connect(path)
    if version == 0:
        engine.dispose()
        return None
    return engine


def _connect(path: Path) -> tuple[Engine, int]:
    """The database and its format, 0 for one whose tables are not all there yet."""
    url = URL.create("sqlite", database=str(path.absolute()))
    engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_SECONDS})
    event.listen(engine, "connect", _set_pragmas)
    try:
        with engine.connect() as connection:
            version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
    except DatabaseError as error:
        raise InputError(f"{path} cannot be opened as a sweep's ledger: {error.orig}") from error
    if version not in (0, SCHEMA_VERSION):
        raise InputError(
            f"{path} has ledger format {version}; this version reads format {SCHEMA_VERSION}: "
            "use the version that wrote it, or another sweep name"
        )
    return engine, version


def _set_pragmas(connection: Any, record: Any) -> None:
    cursor = connection.cursor()
    # every commit reaches the disk: a result that was recorded survives a power cut
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()
