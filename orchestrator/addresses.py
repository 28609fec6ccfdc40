"""Addresses of servers and databases, and how they may be shown."""

import re
from pathlib import Path

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

HIDDEN = "***"

_USERINFO = re.compile(r"(?<=://)(?:([^\s/?#:@]*)(:))?[^\s/?#]*@")
_SECRET_PARAMETER = re.compile(r"([?&][^\s=&#]*(?:pass|pwd|secret|token|key)[^\s=&#]*=)[^\s&#]*", re.IGNORECASE)


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


def _hidden(user: str | None, colon: str | None) -> str:
    return f"{user}:***@" if colon else "***@"
