"""The starts of a sweep, and the lease that lets one driver at a time run it.

On one machine a file lock keeps two drivers apart, and the kernel lets go of it when one dies. For drivers on two
machines, or in two copies of a folder, the ledger holds a lease: the driver at work counts up `beat`, and a newcomer
takes over only after it has seen the count stand still for a while by its own clock; no two clocks are compared.
"""

import os
import platform
import threading
import time
from datetime import UTC, datetime

import psutil
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError

from orchestrator.driver_lock import AtWork
from orchestrator.ledger import Ledger
from orchestrator.ledger_tables import StartRow
from qkmodel.errors import InputError

BEAT_SECONDS = 2.0
# a driver that is swapped out or waits for a slow file system must not lose its lease
PATIENCE_SECONDS = 20.0


class TakenOver(OSError):
    """Another driver is at work on the sweep by now; what is in the ledger is its own."""

    def __init__(self) -> None:
        super().__init__("another start of this sweep took over; this one ends")


class Lease:
    """Held from construction to `release`. `start` is its number, which everything it writes carries."""

    def __init__(self, ledger: Ledger, patience: float = PATIENCE_SECONDS, seconds_before: float = 0.0) -> None:
        """`seconds_before` is what this start took before: it counts as its time, too.

        Raises AtWork when a driver on another machine is at work on the sweep.
        """
        self._ledger = ledger
        latest = refuse_beside_living_driver(ledger, patience)
        self.start = _open_start(ledger, latest + 1, round(seconds_before / BEAT_SECONDS))
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        _update(self._ledger, self.start, ended=datetime.now(UTC))

    @property
    def is_latest(self) -> bool:
        """Whether no other driver took over since."""
        return _latest(self._ledger).number == self.start

    def require_latest(self) -> None:
        """Raises TakenOver: where beats did not reach the ledger for a while, a newcomer took this driver for dead."""
        if not self.is_latest:
            raise TakenOver

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            try:
                _update(self._ledger, self.start, beat=StartRow.beat + 1)
            except (OSError, InputError):
                # a full disk, a file that is away or damaged: the next beat may get through
                continue


def seconds_of_earlier_starts(ledger: Ledger, start: int) -> float:
    """Wall time of the starts before this one, by their own count of beats."""
    with ledger.transaction() as session:
        beats = session.scalars(select(StartRow.beat).where(StartRow.number < start))
        return BEAT_SECONDS * sum(beats)


def is_ended(ledger: Ledger) -> bool:
    """Whether the latest start is over; True where there was none.

    Of one that was killed on another machine this is not known, and False.
    """
    latest = _latest(ledger)
    if latest is None or latest.ended is not None:
        return True
    return _died_here(latest)


def refuse_beside_living_driver(ledger: Ledger, patience: float = PATIENCE_SECONDS) -> int:
    """The number of the latest start, whose driver is dead; 0 where there was none.

    Raises AtWork when a driver on another machine is at work on the sweep; to tell may take `patience`.
    """
    last = _latest(ledger)
    if last is None:
        return 0
    # The file lock would tell, but for a driver in a copy of the folder, whose ledger is in PostgreSQL. Whoever had the
    # number of this process is gone.
    if last.ended is not None or _died_here(last) or (last.host, last.process) == (platform.node(), os.getpid()):
        return last.number
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        time.sleep(min(BEAT_SECONDS, patience) / 2)
        now = _latest(ledger)
        if now.number == last.number and now.ended is not None:
            return last.number
        if (now.number, now.beat) != (last.number, last.beat):
            raise _at_work(ledger)
    return last.number


def _died_here(start: StartRow) -> bool:
    """Whether its process is known to be gone, since it was one of this machine."""
    if start.host != platform.node():
        return False
    try:
        return psutil.Process(start.process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _at_work(ledger: Ledger) -> AtWork:
    now = _latest(ledger)
    return AtWork(f"process {now.process} on {now.host}", ledger.storage.shown(ledger.folder))


def _latest(ledger: Ledger) -> StartRow | None:
    with ledger.transaction() as session:
        row = session.scalar(select(StartRow).order_by(StartRow.number.desc()).limit(1))
        if row is not None:
            session.expunge(row)
        return row


def _open_start(ledger: Ledger, number: int, beat: int) -> int:
    """Raises AtWork when another driver took this number since it was found free."""
    try:
        with ledger.transaction() as session:
            process, started = os.getpid(), datetime.now(UTC)
            session.add(StartRow(number=number, host=platform.node(), process=process, started=started, beat=beat))
    except IntegrityError:
        raise _at_work(ledger) from None
    return number


def _update(ledger: Ledger, start: int, **values: object) -> None:
    with ledger.transaction() as session:
        session.execute(update(StartRow).where(StartRow.number == start).values(**values))
