"""A ledger in an SQLite file: its format, and what makes a commit last."""

import os
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.engine import URL
from sqlalchemy.exc import DatabaseError, DBAPIError, OperationalError

from orchestrator.ledger_tables import LEDGER_FORMAT, Table, refuse_other_format
from orchestrator.storage.shared import SHARED, Storage
from qkmodel.errors import InputError

LEDGER_FILE = "ledger.sqlite"
BUSY_TIMEOUT_SECONDS = 30


class SqliteFile:
    """The file at `path`, in the sweep's folder."""

    insert = staticmethod(insert)

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path.parent
        self.storage: Storage = SHARED

    @property
    def where(self) -> str:
        return str(self.path)

    def create_or_open(self) -> Engine:
        """The database; the file, its folder and its tables are made where missing.

        A creation that a kill cut off is completed. Raises InputError when the file is no ledger that this version
        reads.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        engine, version = self._connect()
        if version == 0:
            with engine.begin() as connection:
                # readers are not blocked by the writer; a property of the file, so it is set once
                connection.exec_driver_sql("PRAGMA journal_mode = WAL")
                Table.metadata.create_all(connection)
                # last, so that a file without it is known to be unfinished
                connection.exec_driver_sql(f"PRAGMA user_version = {LEDGER_FORMAT}")
        return engine

    def open_if_there(self) -> Engine | None:
        """The database, None where there is none or a kill cut its creation off. Creates nothing.

        Raises InputError when the file is no ledger that this version reads.
        """
        if not self.path.is_file():
            return None
        engine, version = self._connect()
        if version == 0:
            engine.dispose()
            return None
        return engine

    def is_away(self, error: DBAPIError) -> bool:
        return False

    def is_at_fault(self, error: DBAPIError) -> bool:
        return isinstance(error, OperationalError)

    def is_damaged(self, error: DBAPIError) -> bool:
        # its subclasses are mistakes of ours
        return type(error) is DatabaseError

    def _connect(self) -> tuple[Engine, int]:
        """The database and its format, 0 for one whose tables are not all there yet."""
        engine = create_engine(_url(self.path.absolute()), connect_args={"timeout": BUSY_TIMEOUT_SECONDS})
        event.listen(engine, "connect", _set_pragmas)
        try:
            with engine.connect() as connection:
                version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
        except DatabaseError as error:
            raise InputError(f"{self.path} cannot be opened as a sweep's ledger: {error.orig}") from error
        if version != 0:
            refuse_other_format(self.where, version)
        return engine, version


def _url(path: Path) -> URL:
    """Where nothing may be written beside the file, one by which SQLite reads it without."""
    if not path.is_file() or os.access(path.parent, os.W_OK):
        return URL.create("sqlite", database=str(path))
    log = path.with_name(f"{path.name}-wal")
    # `immutable` reads the file alone: commits that a kill or a living driver has left beside it would be missed
    is_alone = not log.is_file() or log.stat().st_size == 0
    query = {"uri": "true", "mode": "ro", **({"immutable": "1"} if is_alone else {})}
    return URL.create("sqlite", database=path.as_uri(), query=query)


def _set_pragmas(connection: Any, record: Any) -> None:
    cursor = connection.cursor()
    # every commit reaches the disk: a result that was recorded survives a power cut
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()
