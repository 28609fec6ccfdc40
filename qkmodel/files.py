"""Files that are either whole or absent, and locks that are let go of, whatever kills the process that has them."""

import contextlib
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from qkmodel.errors import InputError

PARTIAL_SUFFIX = ".partial"
# not what was written is wrong then: the same place serves again once the disk does
_DISK_GAVE_OUT = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def user_cache_folder() -> Path:
    """Where a user keeps what can be made again: `$XDG_CACHE_HOME/qkmodel`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qkmodel"


def user_path(key: str, name: str) -> Path:
    """The path that a person wrote under `key`, `~` expanded. Raises InputError when it can be none."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        # an error of the system repeats the whole name
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{key}: {name[:80]} is not a usable path ({reason})") from error
    return path


def require_place(key: str, path: Path) -> None:
    """Raises InputError when `write_atomically` cannot write `path`, which a person gave under `key`."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"{key}: {path} is no file in a folder that is there")
    partial = _partial(path.absolute())
    with _refusing(f"{key}: {path}"):
        partial.touch(exist_ok=False)
        partial.unlink()


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader finds the old content or the new, never a part.

    A process that dies halfway leaves a hidden file beside `path` whose name ends in PARTIAL_SUFFIX.
    """
    with _written_beside(path, data) as partial:
        os.replace(partial, path)
    _sync_folder(path.parent)


def create_atomically(path: Path, data: bytes) -> None:
    """The same for a file that must not be there yet. Raises FileExistsError when it is."""
    with _written_beside(path, data) as partial:
        os.link(partial, path)
    _sync_folder(path.parent)


@contextlib.contextmanager
def _written_beside(path: Path, data: bytes) -> Iterator[Path]:
    partial = _partial(path)
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield partial
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to be filled, which takes the name `folder` at the end of the block and is gone after an exception.

    Raises InputError where `folder` is there already and not an empty folder, and where none can be made.
    """
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise InputError(f"{folder}: is there already and not an empty folder; give another")
    partial = _partial(folder)
    with _refusing(str(folder)):
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    try:
        yield partial
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _sync_folder(folder.parent)


@contextlib.contextmanager
def exclusive(lock: Path, on_busy: Callable[[str], None]) -> Iterator[None]:
    """Hold the file `lock` against other processes; the kernel lets go of it when this one dies.

    Where another process holds it, `on_busy` gets that one's pid, as text, and may raise; if it returns, this waits.
    """
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            on_busy(file.read())
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextlib.contextmanager
def _refusing(place: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_GAVE_OUT:
            raise
        raise InputError(f"{place}: cannot be written ({error.strerror}); give another") from error


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")


def _sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
