"""The ledger's file: SQLite, its format, what makes a commit last, and transactions."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.orm import Session

from orchestrator.ledger_tables import Table, Unreadable
from qkmodel.errors import InputError

LEDGER_FILE = "ledger.sqlite"
SCHEMA_VERSION = 4
BUSY_TIMEOUT_SECONDS = 30


class LedgerFile:
    """A ledger that is open. Safe to share between threads; processes may read while one writes."""

    def __init__(self, path: Path) -> None:
        """Open the ledger at `path`, creating the file and its folder where missing.

        Raises InputError when the file is not a ledger that this version can read.
        """
        self.path = path
        self._engine = _create_or_open(path)
        self._begun = threading.local()

    @classmethod
    def open_if_there(cls, path: Path) -> Self | None:
        """The ledger at `path`, None where no sweep was started yet. Creates nothing.

        Raises InputError when the file is not a ledger that this version can read.
        """
        engine = _open_if_there(path)
        if engine is None:
            return None
        ledger = cls.__new__(cls)
        ledger.path = path
        ledger._engine = engine
        ledger._begun = threading.local()
        return ledger

    @classmethod
    def open_existing(cls, path: Path) -> Self:
        """The ledger of a sweep that was started. Creates nothing.

        Raises InputError when there is none, or not one that this version can read.
        """
        ledger = cls.open_if_there(path)
        if ledger is None:
            raise InputError(f"no sweep here: {path} is not there or empty; give a sweep that was started")
        return ledger

    @property
    def folder(self) -> Path:
        """The sweep's folder, to which the paths of dictionaries are relative."""
        return self.path.parent

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """One transaction: committed at the end of the block, rolled back on an exception.

        Within the block, what this thread asks of the ledger and writes to it is part of the transaction.
        Raises OSError when the database cannot be read or written now: a full disk, a folder that is gone; InputError
        when its file is damaged.
        """
        if (session := getattr(self._begun, "session", None)) is not None:
            yield session
            return
        try:
            with Session(self._engine) as session, session.begin():
                self._begun.session = session
                try:
                    yield session
                finally:
                    self._begun.session = None
        except OperationalError as error:
            raise OSError(f"{self.path}: {error.orig}; once that is mended the same command continues") from error
        except DatabaseError as error:
            # its subclasses are mistakes of ours
            if type(error) is not DatabaseError:
                raise
            raise self._damaged(error.orig) from error
        except (Unreadable, json.JSONDecodeError) as error:
            raise self._damaged(error) from error

    def _damaged(self, reason: object) -> InputError:
        return InputError(f"{self.path} is damaged ({reason}); put a copy of it there, or use another sweep name")


def _create_or_open(path: Path) -> Engine:
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


def _open_if_there(path: Path) -> Engine | None:
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
    engine = create_engine(_url(path.absolute()), connect_args={"timeout": BUSY_TIMEOUT_SECONDS})
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
