"""A ledger in PostgreSQL: a schema of its own for each sweep of a database, with the tables that an SQLite file has."""

import hashlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Column, Connection, Engine, Integer, MetaData, String, create_engine, event, func, select, text
from sqlalchemy import Table as PlainTable
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.schema import CreateSchema

from orchestrator.ledger_pointer import LedgerPointer
from orchestrator.ledger_tables import LEDGER_FORMAT, Table, refuse_other_format
from orchestrator.storage.shared import SHARED, Storage
from qkmodel.errors import InputError

_LONGEST_NAME = 40
# libpq's, unless the address says otherwise. A server is asked at each of its addresses.
_CONNECTION = {
    "connect_timeout": "5",
    "client_encoding": "utf8",
    "application_name": "orchestrate",
    # a server whose machine is gone is noticed after about 25 s, not after hours
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "25000",
}
_SETTINGS = (
    "SET lock_timeout = '30s'",
    # numbers come back as they were, from servers before 12 too
    "SET extra_float_digits = 3",
    # every commit reaches the disk: a result that was recorded survives a power cut
    "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'",
)
_READ_ONLY, _NO_PRIVILEGE, _SHUTDOWN = "25006", "42501", "57P"
# undefined tables, columns and schemas
_UNDEFINED = ("42P01", "42703", "3F000")
# what stands in a schema that this program made
_MARK = PlainTable(
    "ledger",
    MetaData(),
    Column("format", Integer, nullable=False),
    Column("identity", String, nullable=False),
)


def schema_name(sweep: str) -> str:
    """Another one for each sweep's name, and no longer than PostgreSQL takes."""
    return f"sweep_{sweep[:_LONGEST_NAME]}_{_digest(sweep).hex()[:16]}"


class SweepSchema:
    """The ledger of the sweep in `folder`, in the database at `address`.

    `pointer` is what the folder, in `storage`, says of its ledger, None where it says nothing. Who is `reading` may
    have no such folder; for a driver a ledger that the folder does not know is that of a namesake in another folder.
    """

    insert = staticmethod(insert)

    def __init__(
        self,
        address: str,
        schema: str,
        folder: Path,
        pointer: LedgerPointer | None,
        reading: bool = False,
        storage: Storage = SHARED,
    ) -> None:
        self.folder = folder
        self.storage = storage
        self._address = address
        self._schema = schema
        self._pointer = pointer
        self._reading = reading

    @property
    def where(self) -> str:
        return f"{self._address}, schema {self._schema}"

    def create_or_open(self) -> Engine:
        """The database; the schema and its tables are made where missing, all at once or not at all.

        Raises InputError when the server does not answer, when its user may not, and for the ledger of another version
        or another folder.
        """
        pointer = self._pointer or self._new_pointer()
        engine = self._engine()
        try:
            with self._refusing(), engine.begin() as connection:
                # against another driver that begins the same sweep
                connection.execute(select(func.pg_advisory_xact_lock(_lock_number(self._schema))))
                if not self._is_there(connection, pointer):
                    self._require_creatable(connection)
                    connection.execute(CreateSchema(self._schema))
                    Table.metadata.create_all(connection)
                    _MARK.create(connection)
                    connection.execute(_MARK.insert().values(format=LEDGER_FORMAT, identity=pointer.identity))
        except InputError:
            if self._pointer is None:
                pointer.remove(self.folder)
            raise
        if self.storage.url is not None or pointer.address != self._address:
            # what was read in a bucket may be what is to be written there; or the database has moved, or this machine
            # has another name for its server
            LedgerPointer(self._address, self._schema, pointer.identity).replace(self.folder, self.storage)
        return engine

    def open_if_there(self) -> Engine | None:
        """The database, None where no sweep of the name was started in it. Creates nothing.

        Raises InputError as `create_or_open` does, and where a driver may not create what is missing.
        """
        engine = self._engine()
        with self._refusing(), engine.connect() as connection:
            is_there = self._is_there(connection, self._pointer)
            if not is_there and not self._reading:
                self._require_creatable(connection)
        if not is_there:
            engine.dispose()
            return None
        return engine

    def is_away(self, error: DBAPIError) -> bool:
        code = _code(error)
        is_refused = isinstance(error, OperationalError) and code == ""
        return error.connection_invalidated or is_refused or code.startswith(_SHUTDOWN)

    def is_at_fault(self, error: DBAPIError) -> bool:
        return isinstance(error, OperationalError) or _code(error) in (_READ_ONLY, _NO_PRIVILEGE)

    def is_damaged(self, error: DBAPIError) -> bool:
        return _code(error) in _UNDEFINED

    def _new_pointer(self) -> LedgerPointer:
        """Written before there is a ledger, so that one which a kill cut off is known for this folder's."""
        pointer = LedgerPointer(self._address, self._schema, uuid.uuid4().hex)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            pointer.create(self.folder)
        except FileExistsError as error:
            raise InputError(
                f"name: another process began the sweep in {self.folder} just now; start it again"
            ) from error
        return pointer

    def _engine(self) -> Engine:
        url = make_url(self._address).set(drivername="postgresql+psycopg2")
        chosen = {name: value for name, value in _CONNECTION.items() if name not in url.query}
        try:
            engine = create_engine(url, connect_args=chosen, pool_pre_ping=True)
        except ModuleNotFoundError as error:
            raise InputError(f"ledger: {error}; pip install 'qk-sweep-orchestrator[postgresql]'") from error
        event.listen(engine, "connect", _set_up)
        return engine.execution_options(schema_translate_map={None: self._schema})

    def _is_there(self, connection: Connection, pointer: LedgerPointer | None) -> bool:
        """Raises InputError for what is no ledger, of another version, or not the one of this folder."""
        names = text("SELECT 1 FROM pg_catalog.pg_namespace WHERE nspname = :name")
        if connection.execute(names, {"name": self._schema}).first() is None:
            if pointer is not None and pointer.address != self._address:
                raise InputError(
                    f"ledger: the sweep in {self.storage.shown(self.folder)} has its ledger at {pointer.address}, and "
                    f"{self._address} has none of it; write the former"
                )
            return False
        mark = connection.execute(select(_MARK.c.format, _MARK.c.identity)).first()
        if mark is None:
            raise InputError(f"{self.where}: is no sweep's ledger; restore it, or use another sweep name")
        version, identity = mark
        refuse_other_format(self.where, version)
        if pointer is None and self._reading:
            return True
        if pointer is None or pointer.identity != identity:
            raise InputError(
                f"ledger: {self._address} has a sweep of this name in another folder than "
                f"{self.storage.shown(self.folder)}; write the storage that it is in, or another name or database"
            )
        return True

    def _require_creatable(self, connection: Connection) -> None:
        may_create = text("SELECT has_database_privilege(current_database(), 'CREATE'), current_user")
        is_allowed, user = connection.execute(may_create).one()
        if not is_allowed:
            raise InputError(
                f"ledger: {self._address}: user {user} may not create a schema there; have the database's "
                f"owner GRANT CREATE ON DATABASE … TO {user}"
            )
        encoding = connection.execute(text("SHOW server_encoding")).scalar_one()
        if encoding != "UTF8":
            raise InputError(f"ledger: {self._address}: is in {encoding}; give one made with ENCODING 'UTF8'")

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            reason = str(error.orig).strip().partition("\n")[0]
            advice = "; set PGPASSWORD, or write the password to ~/.pgpass" if "password" in reason else ""
            raise InputError(f"ledger: {self._address}: {reason}{advice}") from error


def _set_up(connection: Any, record: Any) -> None:
    # a setting made in a transaction would go with it
    connection.autocommit = True
    with connection.cursor() as cursor:
        for statement in _SETTINGS:
            cursor.execute(statement)
    connection.autocommit = False


def _code(error: DBAPIError) -> str:
    """PostgreSQL's code of what is wrong, empty where nobody answered."""
    return getattr(error.orig, "pgcode", None) or ""


def _lock_number(schema: str) -> int:
    return int.from_bytes(_digest(schema)[:8], "big", signed=True)


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
