"""The lock by which one process of this machine at a time works on a sweep."""

import contextlib
from pathlib import Path

from qkmodel.errors import InputError
from qkmodel.files import exclusive

LOCK_FILE = "lock"


class AtWork(InputError):
    """A driver, `who`, is at work on the sweep in a folder, as people know it."""

    def __init__(self, who: str, folder: str) -> None:
        super().__init__(
            f"name: {who} is at work on the sweep in {folder}; wait for it or end it, or choose another name"
        )
        self.who = who


def only_driver(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Holds the sweep in `folder` against other drivers; workers that a dead one left behind do not hold it.

    Raises AtWork when another process holds it.
    """

    def refuse(holder: str) -> None:
        raise AtWork(f"process {holder}", str(folder))

    return exclusive(folder / LOCK_FILE, refuse)
