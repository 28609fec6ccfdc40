"""Ending this process from a signal's handler or a thread, whatever else it is doing; and children with it."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable

INTERRUPTED = "interrupted; the same command continues where it was\n"
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
_SHOW_CURSOR = "\x1b[?25h"


def end_process(line: str, code: int) -> None:
    """Writes the line to standard error and ends: nothing is cleaned up, as with a kill."""
    shown = f"\n{_SHOW_CURSOR}{line}" if os.isatty(2) else line
    os.write(2, shown.encode())
    os._exit(code)


def end_with_parent() -> Callable[[], None] | None:
    """For a child's `preexec_fn`: it gets SIGTERM when this process ends, however that is. Linux alone has that."""
    return _end_with_parent if sys.platform == "linux" else None


def _end_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
