"""Files that are either whole or absent, and locks that are let go of, whatever kills the process that has them."""

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from qkmodel.errors import InputError

PARTIAL_SUFFIX = ".partial"


def user_cache_folder() -> Path:
    """Where a user keeps what can be made again: `$XDG_CACHE_HOME/qkmodel`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qkmodel"


def user_path(key: str, name: str) -> Path:
    """The path that a person wrote under `key`, `~` expanded. Raises InputError when it can be none."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{key}: {name[:80]} is not a usable path ({error})") from error
    return path


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
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
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

    Raises InputError, before anything is made, where `folder` is there already and not an empty folder.
    """
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise InputError(f"{folder}: is there already and not an empty folder; give another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
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


def _sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
