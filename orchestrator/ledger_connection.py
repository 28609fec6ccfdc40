"""An open ledger: transactions, what is said of a database that fails, and a driver's patience with one."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from orchestrator.ledger_file import SqliteFile
from orchestrator.ledger_records import Unreadable
from orchestrator.storage.shared import Storage
from qkmodel.errors import InputError

MENDED = "once that is mended the same command continues"
RETRY_SECONDS = 1.0
SECONDS_PER_MINUTE = 60

T = TypeVar("T")


class ServerAway(OSError):
    """The database's server does not answer, `reason`; nothing of the transaction that met with it was done."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}; {MENDED}")
        self.where = where
        self.reason = reason


class Place(Protocol):
    """Where a ledger is kept. `folder` is the sweep's in `storage`, to which the paths of dictionaries are relative."""

    folder: Path
    storage: Storage

    @property
    def where(self) -> str:
        """For people, without passwords."""

    def create_or_open(self) -> Engine:
        """Raises InputError when it cannot be had, or is none that this version can read."""

    def open_if_there(self) -> Engine | None:
        """None where no sweep was started yet. Creates nothing. Raises InputError as `create_or_open` does."""

    def insert(self, table: Any) -> Any:
        """An INSERT that can say what is to happen to a row that is there already."""

    def is_away(self, error: DBAPIError) -> bool:
        """Whether a server went away, which may come back."""

    def is_at_fault(self, error: DBAPIError) -> bool:
        """Whether the database cannot read or write now: a full disk, a folder that is gone."""

    def is_damaged(self, error: DBAPIError) -> bool:
        """Whether the ledger is not what this program made; what is none of these is a mistake of ours."""


class Patience:
    """How a driver waits for a server that went away: `seconds` at most, and says so in one line each time.

    `returned` is called once it is back, and raises when the driver may not go on. Where it stayed away for too long
    nothing waits any more.
    """

    def __init__(self, seconds: float, say: Callable[[str], None], returned: Callable[[], None]) -> None:
        self._seconds = seconds
        self._say = say
        self._returned = returned
        self._since: float | None = None

    def wait(self, away: ServerAway) -> None:
        """Returns when it is time to try again. Raises `away` once that was long enough."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
            limit = f"{self._seconds / SECONDS_PER_MINUTE:g} min"
            self._say(f"the ledger's server is away ({away.reason}); waiting for it for at most {limit}")
        if now - self._since >= self._seconds:
            raise away
        time.sleep(min(RETRY_SECONDS, self._seconds))

    @property
    def is_waiting(self) -> bool:
        return self._since is not None

    def end_waiting(self) -> None:
        """Raises what `returned` does."""
        self._since = None
        self._returned()


class LedgerConnection:
    """A ledger that is open. Safe to share between threads; processes may read while one writes."""

    def __init__(self, place: Path | Place) -> None:
        """Open the ledger at `place`, by a path an SQLite file, creating what is missing.

        Raises InputError when it cannot be had, or is no ledger that this version can read.
        """
        self._place = _as_place(place)
        self._engine = self._place.create_or_open()
        self._here = threading.local()

    @classmethod
    def open_if_there(cls, place: Path | Place) -> Self | None:
        """The ledger at `place`, None where no sweep was started yet. Creates nothing.

        Raises InputError when it cannot be had, or is no ledger that this version can read.
        """
        place = _as_place(place)
        engine = place.open_if_there()
        if engine is None:
            return None
        ledger = cls.__new__(cls)
        ledger._place = place
        ledger._engine = engine
        ledger._here = threading.local()
        return ledger

    @classmethod
    def open_existing(cls, place: Path | Place) -> Self:
        """The ledger of a sweep that was started. Creates nothing.

        Raises InputError when there is none, or not one that this version can read.
        """
        ledger = cls.open_if_there(place)
        if ledger is None:
            where = _as_place(place).where
            raise InputError(f"no sweep here: {where} is not there or empty; give a sweep that was started")
        return ledger

    @property
    def where(self) -> str:
        """The database, for people."""
        return self._place.where

    @property
    def folder(self) -> Path:
        """The sweep's folder, to which the paths of dictionaries are relative."""
        return self._place.folder

    @property
    def storage(self) -> Storage:
        """Where that folder is."""
        return self._place.storage

    def require_folder(self) -> None:
        """Raises InputError on a machine that reads the ledger and does not have the sweep's folder.

        Of a bucket's any machine makes itself a working copy.
        """
        if self.storage.url is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        if not self.folder.is_dir():
            raise InputError(f"{self.folder}: is not on this machine; run this where the sweep's folder is")

    def insert(self, table: Any) -> Any:
        """An INSERT that can say what is to happen to a row that is there already."""
        return self._place.insert(table)

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def patience(self, patience: Patience) -> Iterator[None]:
        """Within the block this thread waits for a server that went away; without, that is an error at once."""
        self._here.patience = patience
        try:
            yield
        finally:
            self._here.patience = None

    def patiently(self, body: Callable[[], T]) -> T:
        """What `body` answers, in one transaction. Done again where a server went away in it and came back.

        So it must not matter how often `body` is begun. Raises as `transaction` does.
        """
        while True:
            try:
                with self.transaction():
                    return body()
            except ServerAway as away:
                self._wait(away)

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """One transaction: committed at the end of the block, rolled back on an exception.

        Within the block, what this thread asks of the ledger and writes to it is part of the transaction.
        Raises OSError when the database cannot be read or written now: a full disk, a folder that is gone, and
        (ServerAway) a server that is; InputError when it is damaged.
        """
        if (session := getattr(self._here, "session", None)) is not None:
            yield session
            return
        is_undone = True
        try:
            with self._connected() as session:
                self._here.session = session
                try:
                    yield session
                finally:
                    self._here.session = None
                session.flush()
                # a server that goes away in a commit does not say whether it was made
                is_undone = False
                session.commit()
        except DBAPIError as error:
            raise self._explained(error, is_undone) from error
        except (Unreadable, json.JSONDecodeError) as error:
            raise self._damaged(error) from error

    def _connected(self) -> Session:
        """A session whose database has answered just now."""
        while True:
            session = Session(self._engine)
            try:
                session.connection()
            except DBAPIError as error:
                session.close()
                explained = self._explained(error, is_undone=True)
                if not isinstance(explained, ServerAway):
                    raise explained from error
                self._wait(explained)
                continue
            patience = getattr(self._here, "patience", None)
            if patience is None or not patience.is_waiting:
                return session
            session.close()
            patience.end_waiting()

    def _wait(self, away: ServerAway) -> None:
        patience = getattr(self._here, "patience", None)
        if patience is None:
            raise away
        patience.wait(away)

    def _explained(self, error: DBAPIError, is_undone: bool) -> Exception:
        """What callers get of a database's error: itself, where it is a mistake of ours."""
        reason = str(error.orig).strip().partition("\n")[0]
        if self._place.is_away(error) and is_undone:
            return ServerAway(self.where, reason)
        if self._place.is_away(error) or self._place.is_at_fault(error):
            return OSError(f"{self.where}: {reason}; {MENDED}")
        return self._damaged(reason) if self._place.is_damaged(error) else error

    def _damaged(self, reason: object) -> InputError:
        return InputError(f"{self.where} is damaged ({reason}); put a copy of it there, or use another sweep name")


def _as_place(place: Path | Place) -> Place:
    return SqliteFile(place) if isinstance(place, Path) else place
