"""The lock by which one process of this machine at a time works on a sweep."""

import contextlib
from pathlib import Path

from qkmodel.errors import InputError
from qkmodel.files import exclusive

LOCK_FILE = "lock"


def only_driver(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Holds the sweep in `folder` against other drivers; workers that a dead one left behind do not hold it.

    Raises InputError when another process holds it.
    """

    def refuse(holder: str) -> None:
        raise InputError(
            f"name: process {holder} is at work on the sweep in {folder}; wait for it or end it, or choose another name"
        )

    return exclusive(folder / LOCK_FILE, refuse)
