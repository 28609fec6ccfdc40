"""Ending this process from a signal's handler or a thread, whatever else it is doing."""

import os

INTERRUPTED = "interrupted; the same command continues where it was\n"
_SHOW_CURSOR = "\x1b[?25h"


def end_process(line: str, code: int) -> None:
    """Writes the line to standard error and ends: nothing is cleaned up, as with a kill."""
    shown = f"\n{_SHOW_CURSOR}{line}" if os.isatty(2) else line
    os.write(2, shown.encode())
    os._exit(code)
