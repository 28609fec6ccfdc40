"""From what a sweep file says under `storage` to the place and this machine's paths in it."""

from functools import cache
from pathlib import Path
from urllib.parse import unquote

from orchestrator.storage.address import BucketAddress, check_storage_text, is_bucket
from orchestrator.storage.bucket import Bucket
from orchestrator.storage.shared import SHARED, Storage
from qkmodel.errors import InputError


def open_storage(storage: str) -> Storage:
    """Asks nothing of a bucket yet. Raises InputError for what is no address of one."""
    return _bucket(storage) if is_bucket(storage) else SHARED


def local_root(storage: str) -> Path:
    """Where sweep folders and activation caches lie on this machine: of a bucket, its working copy here."""
    return _bucket(storage).root if is_bucket(storage) else Path(storage).expanduser().absolute()


def open_in_bucket(url: str, parts: int = 1) -> tuple[Bucket, Path]:
    """The bucket of an address that names a thing in it by its last `parts` parts, and that thing's path here.

    Raises InputError.
    """
    try:
        address, name = BucketAddress.parse(url).split(parts)
    except InputError as error:
        # credentials stand before an @, or after the ?
        shown = url.partition("?")[0] if "@" not in unquote(url) else f"{url.partition('://')[0]}://…"
        raise InputError(f"{shown}: {error}") from error
    bucket = _bucket(address.text)
    return bucket, bucket.root / name


def _bucket(storage: str) -> Bucket:
    check_storage_text(storage)
    return _opened(BucketAddress.parse(storage))


@cache
def _opened(address: BucketAddress) -> Bucket:
    # with its connections
    return Bucket(address)
