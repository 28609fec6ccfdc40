"""The process `orchestrate`: what interrupts it, and with which exit code it ends."""

import os
import signal
import sys
from types import FrameType

from orchestrator.process_end import INTERRUPTED, end_process


def main() -> None:
    # An exception would not do: raised in an import, pydantic and others catch it and raise one of their own. All that
    # is on disk stands a kill, and what runs Ray has handlers of its own (stopping.py).
    signal.signal(signal.SIGINT, _end_at_once)
    signal.signal(signal.SIGTERM, _end_at_once)
    try:
        from orchestrator.cli import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt as interruption:
        sys.stdout.flush()
        # at once: taking the interpreter down takes seconds on a busy machine, and the ten are nearly over
        end_process(INTERRUPTED, 128 + next(iter(interruption.args), signal.SIGINT))
    # all is done: a signal while the interpreter goes down ends it, and makes no failure of it
    sys.stdout.flush()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(code))
    sys.exit(code)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    end_process(INTERRUPTED, 128 + number)


if __name__ == "__main__":
    main()
