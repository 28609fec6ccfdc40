"""What a sweep's storage must be. Apart, so that a job that only looks does without torch."""

import http.client
import ssl
import tempfile
import threading
import urllib.error
import urllib.request
from pathlib import Path

from orchestrator.storage.address import BucketAddress, credentials, is_bucket
from orchestrator.storage.bucket import Bucket
from orchestrator.storage.opened import local_root
from qkmodel.errors import InputError

CACHE_FOLDER = "activations"
RESERVED_NAMES = (CACHE_FOLDER, "mlflow-artifacts", "jobs")
# libraries of object stores may wait for a server, or for credentials, longer than anybody looks on
ANSWER_SECONDS = 3.0
BUCKET_SECONDS = 8.0


def check_storage(name: str, storage: str) -> None:
    """Refuses a sweep's name, or a storage, that nothing could be written to. Leaves nothing behind."""
    if name in RESERVED_NAMES:
        raise InputError(f"name: {name} is taken by a folder of the storage itself; choose another")
    if is_bucket(storage):
        check_bucket(storage)
    else:
        _check_folder(local_root(storage) / name)


def check_bucket(url: str, is_written: bool = True) -> None:
    """Refuses a bucket that cannot be read from here, or also written to. Leaves nothing behind."""
    bucket = Bucket(BucketAddress.parse(url))
    _require_answer(bucket.address)
    wrong: list[Exception] = []

    def look() -> None:
        try:
            bucket.require_writable() if is_written else bucket.require_readable()
        except (InputError, OSError) as error:
            # raised in a thread, it would go no further
            wrong.append(error)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(BUCKET_SECONDS)
    if looking.is_alive():
        advice = f"look whether its server is the right one, or {credentials(bucket.address.scheme)}"
        raise InputError(f"storage: {url}: no answer within {BUCKET_SECONDS:g} s; {advice}")
    if wrong:
        raise wrong[0]


def _require_answer(address: BucketAddress) -> None:
    """Refuses a server of one's own that does not answer: the store's library would wait, also at the process's end."""
    options = dict(address.options)
    if "endpoint_override" not in options:
        return
    server = f"{options.get('scheme', 'https')}://{options['endpoint_override']}"
    try:
        urllib.request.urlopen(server, timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        # an answer
        return
    except (OSError, http.client.HTTPException) as error:
        if isinstance(getattr(error, "reason", error), ssl.SSLError):
            # somebody is there
            return
        reason = getattr(error, "reason", None) or error
        raise InputError(
            f"storage: {address.text}: no server answers there ({reason}); see whether it runs, or write where it is "
            "after ?endpoint_override="
        ) from error


def _check_folder(folder: Path) -> None:
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir():
        raise InputError(f"storage: {there} is a file; give a folder, or a path where one can be made")
    try:
        # permissions alone do not tell: root may write everywhere, and /proc takes nothing
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(f"storage: {there} cannot be written to ({error.strerror}); give a folder that can") from error
