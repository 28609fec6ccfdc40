"""The address of a bucket in which sweeps are kept: s3://BUCKET/PREFIX or gs://BUCKET/PREFIX, with an endpoint."""

import re
from dataclasses import dataclass
from typing import Self
from urllib.parse import parse_qsl, unquote, urlencode

from qkmodel.errors import InputError
from qkmodel.files import user_path

_BUCKET = {
    "s3": re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", re.ASCII),
    "gs": re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", re.ASCII),
}
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*", re.ASCII)
_OPTIONS = {
    "endpoint_override": re.compile(r"[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*(:[0-9]{1,5})?", re.ASCII),
    "scheme": re.compile(r"https?", re.ASCII),
    "region": re.compile(r"[a-z0-9-]+", re.ASCII),
}
_TAKEN = {"s3": ("endpoint_override", "scheme", "region"), "gs": ("endpoint_override", "scheme")}
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS",
}
_SECRET = re.compile(r"key|secret|token|pass|credential", re.IGNORECASE)


@dataclass(frozen=True)
class BucketAddress:
    """`prefix` is what all keys begin with, without a slash at either end; `options` say which server has it."""

    scheme: str
    bucket: str
    prefix: str
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises InputError, with nothing in it that may be secret, for what is no such address."""
        scheme, _, rest = text.partition("://")
        if scheme not in _BUCKET:
            raise InputError("must be the path of a folder, or s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")
        path, _, query = rest.partition("?")
        if "@" in unquote(rest) or any(_SECRET.search(name) for name, _ in parse_qsl(query, keep_blank_values=True)):
            raise InputError(
                f"has credentials in it, which would lie in files; take them out and {credentials(scheme)}"
            )
        bucket, _, prefix = path.partition("/")
        prefix = prefix.removesuffix("/")
        if not _BUCKET[scheme].fullmatch(bucket):
            raise InputError(f"{scheme}://{bucket[:80]}: is no name of a bucket; write {scheme}://BUCKET/PREFIX")
        if prefix and not all(_PART.fullmatch(part) for part in prefix.split("/")):
            raise InputError(
                "the prefix after the bucket's name takes letters, digits, - . and _ between single slashes"
            )
        return cls(scheme, bucket, prefix, _options(scheme, query))

    @property
    def text(self) -> str:
        """The address, written always in the same way."""
        return self.url("")

    def key(self, name: str) -> str:
        """`name`, relative to the prefix, as pyarrow has it: with the bucket before it."""
        return "/".join(part for part in (self.bucket, self.prefix, name) if part)

    def url(self, name: str) -> str:
        """The address of `name`, relative to the prefix, by which any machine finds it."""
        query = f"?{urlencode(self.options, safe=':')}" if self.options else ""
        return f"{self.scheme}://{self.key(name)}{query}"

    def split(self, parts: int) -> tuple[Self, str]:
        """The address without its last `parts` parts, and these. Raises InputError where there are no more."""
        all_parts = self.prefix.split("/") if self.prefix else []
        if len(all_parts) < parts:
            raise InputError(f"{self.text}: names a bucket; write the name of what is meant in it after that")
        kept, last = all_parts[: len(all_parts) - parts], all_parts[len(all_parts) - parts :]
        return type(self)(self.scheme, self.bucket, "/".join(kept), self.options), "/".join(last)


def is_bucket(storage: str) -> bool:
    """Whether it is meant for the address of a bucket."""
    return "://" in storage


def check_storage_text(storage: str) -> None:
    """Raises InputError for what can be neither a folder nor the address of a bucket; asks nothing of either."""
    if not is_bucket(storage):
        user_path("storage", storage)
        return
    try:
        BucketAddress.parse(storage)
    except InputError as error:
        raise InputError(f"storage: {error}") from error


def credentials(scheme: str) -> str:
    """What to do for access to a bucket, for people."""
    return _CREDENTIALS[scheme]


def _options(scheme: str, query: str) -> tuple[tuple[str, str], ...]:
    found = parse_qsl(query, keep_blank_values=True)
    for name, value in found:
        if name not in _TAKEN[scheme]:
            raise InputError(f"{name[:40]}: is nothing to write after the ?; known are {', '.join(_TAKEN[scheme])}")
        if not _OPTIONS[name].fullmatch(value):
            wanted = "HOST:PORT" if name == "endpoint_override" else "http or https" if name == "scheme" else "a region"
            raise InputError(f"{name}={value[:80]}: is not {wanted}")
    if len(dict(found)) < len(found):
        raise InputError("names an option after the ? twice; keep one")
    return tuple(sorted(found))
