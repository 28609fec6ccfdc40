"""Addresses of servers and databases, and how they may be shown."""

import re

HIDDEN = "***"

_USERINFO = re.compile(r"(?<=://)(?:([^\s/?#:@]*)(:))?[^\s/?#]*@")
_SECRET_PARAMETER = re.compile(r"([?&][^\s=&#]*(?:pass|pwd|secret|token|key)[^\s=&#]*=)[^\s&#]*", re.IGNORECASE)


def redact_url(text: str) -> str:
    """`text` with the secrets of every address in it replaced by `***`.

    Secrets are the password in `scheme://user:password@host`, the whole of `token` in `scheme://token@host`,
    and the values of query parameters whose name speaks of a password, secret, token or key.
    """
    return _SECRET_PARAMETER.sub(r"\1***", _USERINFO.sub(lambda found: _hidden(*found.groups()), text))


def _hidden(user: str | None, colon: str | None) -> str:
    return f"{user}:***@" if colon else "***@"
