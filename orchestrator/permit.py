"""The file by which a driver tells packs to go on, to write a checkpoint and end, or that their driver is dead.

A file in the sweep's folder, because it is the one thing that every worker of a sweep can see, on whatever machine and
whoever started it. It holds the number of the sweep's latest start; packs of an earlier start write nothing any more.
"""

import math
import time
from enum import Enum
from pathlib import Path

from orchestrator.storage.shared import SHARED, Storage

PERMIT_FILE = "permit"
# packs look before every step, and a bucket takes longer to answer than a step; of ten seconds two can be waited
BUCKET_SECONDS = 2.0
_STOP = "stop"


class Permit(Enum):
    """What a pack may do."""

    GO = "go on"
    STOP = "write a checkpoint and end"
    FENCED = "end and write nothing: another start of the sweep is at work"


def grant(sweep_folder: Path, start: int, storage: Storage = SHARED) -> None:
    """Lets packs of start number `start` go on, and no others."""
    storage.write(sweep_folder / PERMIT_FILE, f"{start}\n".encode())


def ask_to_stop(sweep_folder: Path, start: int, storage: Storage = SHARED) -> None:
    """Has packs of start number `start` write a checkpoint after their present step and end."""
    storage.write(sweep_folder / PERMIT_FILE, f"{start} {_STOP}\n".encode())


class PermitReader:
    """What packs of start number `start` may do. What a bucket said holds for `BUCKET_SECONDS`."""

    def __init__(self, sweep_folder: Path, start: int, storage: Storage = SHARED) -> None:
        self._file = sweep_folder / PERMIT_FILE
        self._start = start
        self._storage = storage
        self._read_at = -math.inf
        self._permit = Permit.GO

    def current(self) -> Permit:
        """Raises OSError when the sweep's folder cannot be read."""
        if self._storage.url is None or time.monotonic() - self._read_at >= BUCKET_SECONDS:
            return self.now()
        return self._permit

    def now(self) -> Permit:
        """The same, read anew."""
        content = self._storage.read(self._file)
        if content is None:
            raise FileNotFoundError(f"{self._storage.shown(self._file)}: is gone")
        self._read_at = time.monotonic()
        holder, *words = content.decode().split()
        if int(holder) != self._start:
            self._permit = Permit.FENCED
        else:
            self._permit = Permit.STOP if words == [_STOP] else Permit.GO
        return self._permit
