"""A bucket of an object store: what is in it counts, and each machine has a working copy of what it needs.

Objects appear whole or not at all, so nothing is written under another name first; a folder is sent with the file that
makes it count last. A copy has the time of its object, by which it is known for one.
"""

import contextlib
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.storage.address import BucketAddress, credentials
from orchestrator.storage.shared import StorageGivesOut, remove_local
from qkmodel.errors import InputError
from qkmodel.files import PARTIAL_SUFFIX, user_cache_folder

if TYPE_CHECKING:
    # takes a third of a second to import
    from pyarrow.fs import FileInfo, FileSystem

_CHUNK = 8 * 2**20
_CONNECT_SECONDS = 3.0
_FORGOTTEN_SECONDS = 86_400
# a look at the start ends within seconds; what was sent in hours is worth a minute of patience
_ATTEMPTS_OF_A_LOOK, _ATTEMPTS = 2, 8
_SECONDS_OF_A_LOOK, _SECONDS = 10, 60
_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|[Bb]ucket does not exist|Bucket not found")
_NO_ACCESS = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|InvalidAccessKeyId|SignatureDoesNotMatch"
)
_NO_SERVER = re.compile(r"NETWORK_CONNECTION|curlCode")


@dataclass(frozen=True)
class Stamp:
    """Of an object: its size in bytes, and when it was written."""

    size: int
    time_ns: int


class Bucket:
    """See `Storage`."""

    def __init__(self, address: BucketAddress) -> None:
        self.address = address
        self.url = address.text

    @property
    def root(self) -> Path:
        """The working copy on this machine."""
        readable = re.sub(r"[^A-Za-z0-9]+", "-", self.address.key(""))[:40].strip("-")
        digest = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        return working_copies() / f"{readable}-{digest}"

    def shown(self, path: Path) -> str:
        return self.address.url(self._name(path))

    def require_writable(self) -> None:
        """Writes and removes an object. Raises InputError, within seconds, where that cannot be done from here."""
        key = self.address.key(f".probe-{uuid.uuid4().hex}")
        try:
            with self._telling(self.url):
                self._put(self._quick, key, b"?")
                self._quick.delete_file(key)
        except StorageGivesOut as error:
            raise InputError(f"storage: {self.url}: {error.reason}; {self._advice(str(error.__cause__))}") from error

    def require_readable(self) -> None:
        """Raises InputError, within seconds, where the bucket cannot be listed from here."""
        from pyarrow.fs import FileType

        try:
            with self._telling(self.url):
                is_there = self._quick.get_file_info(self.address.bucket).type == FileType.Directory
        except StorageGivesOut as error:
            raise InputError(f"{self.url}: {error.reason}; {self._advice(str(error.__cause__))}") from error
        if not is_there:
            raise InputError(f"{self.url}: there is no such bucket; make it, or write the name of one")

    def send(self, path: Path, last: str | None = None) -> None:
        files = [one for one in sorted(path.rglob("*")) if one.is_file()] if path.is_dir() else [path]
        for file in sorted(files, key=lambda one: one.name == last):
            if not file.name.endswith(PARTIAL_SUFFIX):
                self._send_file(file)

    def send_changed(self, file: Path) -> None:
        if not self.is_current(file):
            self._send_file(file)

    def is_current(self, file: Path) -> bool:
        """Whether `file` is a copy of its object."""
        with self._telling(self.shown(file)):
            info = self._files.get_file_info(self._key(file))
        return info.is_file and is_copy(file, _stamp(info))

    def release(self, path: Path) -> None:
        is_folder = path.is_dir()
        remove_local(path)
        # a folder beside it may be being made just now by another pack of the node
        if not is_folder:
            with contextlib.suppress(OSError):
                path.parent.rmdir()

    def fetch(self, path: Path, stamp: Stamp | None = None) -> bool:
        """`stamp` is that of a file, where it is known from `listing`."""
        from pyarrow.fs import FileType

        if stamp is None:
            with self._telling(self.shown(path)):
                info = self._files.get_file_info(self._key(path))
            if info.type == FileType.Directory:
                return self._fetch_folder(path)
            if info.type == FileType.NotFound:
                remove_local(path)
                return False
            stamp = _stamp(info)
        if not is_copy(path, stamp):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
            try:
                self.download(path, partial)
                os.utime(partial, ns=(stamp.time_ns, stamp.time_ns))
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        return True

    @contextlib.contextmanager
    def borrowed(self, path: Path) -> Iterator[Path]:
        # a place of its own: another process may send and release the same
        borrowed = self.root / ".borrowed"
        folder = borrowed / uuid.uuid4().hex
        folder.mkdir(parents=True)
        for other in borrowed.iterdir():
            # of a process that was killed: reading a file takes minutes
            with contextlib.suppress(FileNotFoundError):
                if time.time() - other.stat().st_mtime > _FORGOTTEN_SECONDS:
                    shutil.rmtree(other, ignore_errors=True)
        try:
            self.download(path, folder / path.name)
            yield folder / path.name
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def download(self, path: Path, to: Path) -> None:
        """Writes the object of `path` to the file `to`. Raises FileNotFoundError."""
        with (
            self._telling(self.shown(path)),
            self._files.open_input_stream(self._key(path)) as stream,
            to.open("wb") as file,
        ):
            while chunk := stream.read(_CHUNK):
                file.write(chunk)

    def size(self, path: Path) -> int:
        """Bytes of the object of `path`. Raises FileNotFoundError."""
        with self._telling(self.shown(path)):
            size = self._files.get_file_info(self._key(path)).size
        if size is None:
            raise FileNotFoundError(f"{self.shown(path)}: is not there")
        return size

    def read(self, path: Path) -> bytes | None:
        try:
            with self._telling(self.shown(path)), self._files.open_input_stream(self._key(path)) as stream:
                return stream.read()
        except FileNotFoundError:
            return None

    def write(self, path: Path, data: bytes) -> None:
        with self._telling(self.shown(path)):
            self._put(self._files, self._key(path), data)

    def names(self, folder: Path) -> list[str]:
        return sorted(info.base_name for info in self._below(folder, recursive=False))

    def listing(self, folder: Path) -> Mapping[Path, Stamp]:
        """All files below a folder."""
        start = len(self._key(folder)) + 1
        return {folder / info.path[start:]: _stamp(info) for info in self._below(folder) if info.is_file}

    def remove(self, path: Path) -> None:
        from pyarrow.fs import FileType

        # a worker of a dead driver may remove the same
        with contextlib.suppress(FileNotFoundError), self._telling(self.shown(path)):
            found = self._files.get_file_info(self._key(path)).type
            if found == FileType.Directory:
                self._files.delete_dir(self._key(path))
            elif found == FileType.File:
                self._files.delete_file(self._key(path))
        remove_local(path)

    def move(self, path: Path, to: Path) -> None:
        with self._telling(self.shown(path)):
            self._files.move(self._key(path), self._key(to))
        remove_local(path)

    def _send_file(self, file: Path) -> None:
        import pyarrow

        size = file.stat().st_size
        with self._telling(self.shown(file)):
            # mapped, so that nothing can go wrong in between that would leave half of it
            data = pyarrow.memory_map(str(file)).read_buffer() if size else b""
            self._put(self._files, self._key(file), data)
            info = self._files.get_file_info(self._key(file))
        if info.size != size:
            raise StorageGivesOut(self.shown(file), f"{size} bytes were sent and {info.size} are there")
        os.utime(file, ns=(info.mtime_ns, info.mtime_ns))

    def _fetch_folder(self, folder: Path) -> bool:
        listed = self.listing(folder)
        for path in folder.rglob("*"):
            # what has another name still is being fetched by another process
            if path not in listed and path.is_file() and not path.name.endswith(PARTIAL_SUFFIX):
                path.unlink(missing_ok=True)
        for path, stamp in listed.items():
            self.fetch(path, stamp)
        return bool(listed)

    def _below(self, folder: Path, recursive: bool = True) -> "list[FileInfo]":
        from pyarrow.fs import FileSelector

        selected = FileSelector(self._key(folder), allow_not_found=True, recursive=recursive)
        with self._telling(self.shown(folder)):
            return self._files.get_file_info(selected)

    def _name(self, path: Path) -> str:
        name = path.relative_to(self.root).as_posix()
        return "" if name == "." else name

    def _key(self, path: Path) -> str:
        return self.address.key(self._name(path))

    @staticmethod
    def _put(files: "FileSystem", key: str, data: object) -> None:
        with files.open_output_stream(key) as stream:
            stream.write(data)

    @cached_property
    def _files(self) -> "FileSystem":
        return self._connected(_ATTEMPTS, _SECONDS)

    @cached_property
    def _quick(self) -> "FileSystem":
        """For a look before anything is started."""
        return self._connected(_ATTEMPTS_OF_A_LOOK, _SECONDS_OF_A_LOOK)

    def _connected(self, attempts: int, seconds: int) -> "FileSystem":
        from pyarrow import fs

        options = dict(self.address.options)
        if self.address.scheme == "gs":
            return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=seconds), **options)
        strategy = fs.AwsStandardS3RetryStrategy(max_attempts=attempts)
        return fs.S3FileSystem(
            connect_timeout=_CONNECT_SECONDS, allow_delayed_open=True, retry_strategy=strategy, **options
        )

    @contextlib.contextmanager
    def _telling(self, where: str) -> Iterator[None]:
        """What pyarrow and the stores' libraries raise, in one line."""
        from pyarrow import ArrowException

        try:
            yield
        except (FileNotFoundError, StorageGivesOut):
            raise
        except (OSError, ArrowException) as error:
            if isinstance(error, OSError) and error.errno is not None:
                # this machine's disk, not the store
                raise
            raise StorageGivesOut(where, _reason(str(error))) from error

    def _advice(self, text: str) -> str:
        """What to do about an error at the start."""
        if _NO_BUCKET.search(text):
            return "make it, or write the name of one"
        return credentials(self.address.scheme)


def working_copies() -> Path:
    """Those of all buckets on this machine, which no other sees."""
    return user_cache_folder() / "storage"


def _reason(text: str) -> str:
    """Of a store's library, in a few words."""
    if _NO_BUCKET.search(text):
        return "there is no such bucket"
    if _NO_ACCESS.search(text):
        return "the credentials do not give access to it"
    if _NO_SERVER.search(text):
        return "no server answers"
    return (text.splitlines() or ["it cannot be used"])[0][:300]


def is_copy(path: Path, stamp: Stamp) -> bool:
    """Whether the file at `path` was sent or fetched as the object with this stamp."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return (found.st_size, found.st_mtime_ns) == (stamp.size, stamp.time_ns)


def _stamp(info: "FileInfo") -> Stamp:
    return Stamp(info.size, info.mtime_ns)
