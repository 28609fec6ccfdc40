"""Addresses of servers and databases, and how they may be shown."""

import re
from pathlib import Path
from urllib.parse import urlsplit

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from qkmodel.errors import InputError

HIDDEN = "***"

_USERINFO = re.compile(r"(?<=://)(?:([^\s/?#:@]*)(:))?[^\s/?#]*@")
_SECRET_PARAMETER = re.compile(r"([?&][^\s=&#]*(?:pass|pwd|secret|token|key)[^\s=&#]*=)[^\s&#]*", re.IGNORECASE)

# of libpq, which reads secrets from them
_SECRET_FILES = {"passfile", "sslkey"}


def redact_url(text: str) -> str:
    """`text` with the secrets of every address in it replaced by `***`.

    Secrets are the password in `scheme://user:password@host`, the whole of `token` in `scheme://token@host`,
    and the values of query parameters whose name speaks of a password, secret, token or key.
    """
    return _SECRET_PARAMETER.sub(r"\1***", _USERINFO.sub(lambda found: _hidden(*found.groups()), text))


def sqlite_file(address: str) -> Path | None:
    """The file of an SQLite database, None for the address of anything else.

    Raises ValueError when the address is SQLite's and names no file.
    """
    if not address.startswith("sqlite"):
        return None
    try:
        url = make_url(address)
    except ArgumentError:
        url = None
    if url is None or url.host or not url.database or url.database == ":memory:":
        raise ValueError("names no file; write sqlite:///FILE.db, or sqlite:////FOLDER/FILE.db for a whole path")
    return Path(url.database)


def whole_address(address: str) -> str:
    """The same address; an SQLite database's with its whole path, as it is from the present folder.

    Raises ValueError as `sqlite_file`.
    """
    file = sqlite_file(address)
    if file is None or file.is_absolute():
        return address
    scheme, _, relative = address.partition(":///")
    return f"{scheme}:///{Path.cwd()}/{relative}"


def require_readable(address: str) -> None:
    """Raises InputError for the address of a server or database whose host and port cannot be taken out of it."""
    try:
        parts = urlsplit(address)
        # brackets, ports and names that Python does not take
        _, host = parts.port, (parts.hostname or "").encode("idna")
        has_host = bool(host) or parts.scheme not in ("http", "https")
        # where a password begins with digits and a /, they are taken for a port and the rest for a path
        is_readable = has_host and (not parts.netloc or "@" in parts.netloc or "@" not in address)
    except ValueError:
        is_readable = False
    if not is_readable:
        # the value is not shown: what cannot be taken apart cannot be redacted either
        raise InputError("tracking: host and port cannot be read; in a password write / as %2F, ? as %3F, # as %23")


def require_ledger_address(address: object) -> None:
    """Raises InputError for what is no address of a PostgreSQL database, and for one with a password in it.

    The value is shown in neither case.
    """
    try:
        url = make_url(address) if isinstance(address, str) else None
    except (ArgumentError, ValueError):
        # the latter: of a port
        url = None
    if url is None or url.drivername != "postgresql" or not url.database:
        raise InputError(
            "ledger: is no address of a PostgreSQL database; write postgresql://HOST/DATABASE, with USER@ before HOST, "
            "or null for a file in the sweep's folder"
        )
    # as in `require_readable`
    is_cut = "@" in url.database
    secrets = [name for name in url.query if _SECRET_PARAMETER.match(f"?{name}=") and name not in _SECRET_FILES]
    if url.password is not None or secrets or is_cut:
        raise InputError(
            "ledger: has a password in it, which would lie in files; take it out and set PGPASSWORD, or write it to "
            "~/.pgpass"
        )


def _hidden(user: str | None, colon: str | None) -> str:
    return f"{user}:***@" if colon else "***@"
