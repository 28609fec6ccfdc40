"""What a sweep does with the place it is kept in, and the plain case: a folder that all machines see.

Everything goes on working with local paths. In a shared folder they are the place itself. Of a bucket each machine has
a working copy with the same layout, from which what counts is sent, and into which it is fetched.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from qkmodel.files import write_atomically


class Storage(Protocol):
    """`url` is a bucket's address, None of a folder. Paths are local. All raise OSError when the place gives out."""

    url: str | None

    def shown(self, path: Path) -> str:
        """How people and other machines name what lies at `path`."""

    def send(self, path: Path, last: str | None = None) -> None:
        """Returns once a file, or all of a folder, is there for every machine; the file named `last` comes last."""

    def send_changed(self, file: Path) -> None:
        """The same for a file that may have been fetched and be as it was: then it is not sent again."""

    def release(self, path: Path) -> None:
        """Takes away this machine's copy of what was sent; what is shared stays."""

    def fetch(self, path: Path) -> bool:
        """Has a file or folder lie at `path` as it is in the place; answers whether there is one."""

    def borrowed(self, path: Path) -> contextlib.AbstractContextManager[Path]:
        """A file of the place to be read in the block. Raises FileNotFoundError."""

    def read(self, path: Path) -> bytes | None:
        """A small file's content, None where there is none."""

    def write(self, path: Path, data: bytes) -> None:
        """Writes a small file for every machine."""

    def names(self, folder: Path) -> list[str]:
        """What lies in a folder: files and folders; nothing where there is none."""

    def remove(self, path: Path) -> None:
        """Removes a file or a folder, if it is there."""

    def move(self, path: Path, to: Path) -> None:
        """Gives a file another name."""


class SharedFolder:
    """See `Storage`: a file is where it is."""

    url = None

    def shown(self, path: Path) -> str:
        return str(path)

    def send(self, path: Path, last: str | None = None) -> None:
        """Nothing: it is there."""

    def send_changed(self, file: Path) -> None:
        """Nothing: it is there."""

    def release(self, path: Path) -> None:
        """Nothing: it is the only one."""

    def fetch(self, path: Path) -> bool:
        return path.exists()

    @contextlib.contextmanager
    def borrowed(self, path: Path) -> Iterator[Path]:
        yield path

    def read(self, path: Path) -> bytes | None:
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, path: Path, data: bytes) -> None:
        write_atomically(path, data)

    def names(self, folder: Path) -> list[str]:
        try:
            return sorted(one.name for one in folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def remove(self, path: Path) -> None:
        remove_local(path)

    def move(self, path: Path, to: Path) -> None:
        path.replace(to)


SHARED = SharedFolder()


class StorageGivesOut(OSError):
    """A bucket that cannot be read or written now, `where` and for which `reason`."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}; once that is mended the same command continues")
        self.where = where
        self.reason = reason


def remove_local(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
