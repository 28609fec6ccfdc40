"""Ending a sweep before it is done: packs write checkpoints, nothing new is begun, and all of it within seconds."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from orchestrator.pack_queue import PackQueue
from orchestrator.permit import ask_to_stop
from orchestrator.process_end import INTERRUPTED, end_process
from orchestrator.storage.shared import SHARED, Storage

# Schedulers send SIGKILL after 10 s or more. What packs have not written by then costs one checkpoint interval.
GRACE_SECONDS = 7.0
BREAK_OFF_SECONDS = 0.1
DEADLINE_SECONDS = 9.0
# Clusters signal a whole group of processes, and the one around this passes it on: together they are one signal.
SAME_SIGNAL_SECONDS = 1.0


class Stopping:
    """Whether the packs were asked to end, and why: a signal, or a budget that is used up."""

    def __init__(self, queue: PackQueue, sweep_folder: Path, start: int, storage: Storage = SHARED) -> None:
        self._queue = queue
        self._storage = storage
        self._folder = sweep_folder
        self._start = start
        self.signal: int | None = None
        self._signalled = 0.0
        self.budget_line: str | None = None

    def check_budget(self) -> None:
        if not self._queue.stopping and (line := self._queue.exceeded_budget()) is not None:
            self.budget_line = line
            self._stop()

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM stop the packs; after `GRACE_SECONDS` the wait for them is broken off.

        What is raised in the block after such a signal goes no further: `signal` says what happened.
        """
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, self._on_signal)
        try:
            yield
        except KeyboardInterrupt:
            if self.signal is None:
                raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if time.monotonic() - self._signalled < SAME_SIGNAL_SECONDS:
                return
            end_process("ended at once; the same command continues from the last checkpoints\n", 128 + number)
        self.signal, self._signalled = number, time.monotonic()
        # SIGALRM wakes Tune's loop, whatever it waits for
        signal.signal(signal.SIGALRM, self._break_off)
        signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)
        # and where Ray was asked to end as well, the main thread may be in a call to it that does not return
        # or what comes after the packs takes long: MLflow, the ledger's last commit on a busy disk
        deadline = threading.Timer(DEADLINE_SECONDS, end_process, (INTERRUPTED, 128 + number))
        deadline.daemon = True
        deadline.start()
        try:
            self._stop()
        except OSError:
            # a full disk, a folder that is gone: packs cannot be told, so there is nothing to wait for
            signal.setitimer(signal.ITIMER_REAL, BREAK_OFF_SECONDS)

    def _break_off(self, number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def _stop(self) -> None:
        self._queue.stopping = True
        ask_to_stop(self._folder, self._start, self._storage)
