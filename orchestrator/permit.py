"""The file by which a driver tells packs to go on, to write a checkpoint and end, or that their driver is dead.

A file in the sweep's folder, because it is the one thing that every worker of a sweep can see, on whatever machine and
whoever started it. It holds the number of the sweep's latest start; packs of an earlier start write nothing any more.
"""

from enum import Enum
from pathlib import Path

from qkmodel.files import write_atomically

PERMIT_FILE = "permit"
_STOP = "stop"


class Permit(Enum):
    """What a pack may do."""

    GO = "go on"
    STOP = "write a checkpoint and end"
    FENCED = "end and write nothing: another start of the sweep is at work"


def grant(sweep_folder: Path, start: int) -> None:
    """Lets packs of start number `start` go on, and no others."""
    write_atomically(sweep_folder / PERMIT_FILE, f"{start}\n".encode())


def ask_to_stop(sweep_folder: Path, start: int) -> None:
    """Has packs of start number `start` write a checkpoint after their present step and end."""
    write_atomically(sweep_folder / PERMIT_FILE, f"{start} {_STOP}\n".encode())


def permit(sweep_folder: Path, start: int) -> Permit:
    """What packs of start number `start` may do now. Raises OSError when the sweep's folder cannot be read."""
    holder, *words = (sweep_folder / PERMIT_FILE).read_text().split()
    if int(holder) != start:
        return Permit.FENCED
    return Permit.STOP if words == [_STOP] else Permit.GO
