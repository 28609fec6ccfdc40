"""The process `orchestrate`: what interrupts it, and with which exit code it ends.

The rest is imported in here, so that an interruption of these imports, which take seconds, is answered too.
"""

import signal
import sys
from types import FrameType


def main() -> None:
    stopped_by = signal.SIGINT

    def terminate(number: int, frame: FrameType | None) -> None:
        # not told apart by the exception: Tune catches it and raises another
        nonlocal stopped_by
        stopped_by = signal.SIGTERM
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    try:
        from orchestrator.cli import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt as interruption:
        sys.stderr.write("interrupted; the same command continues where it was\n")
        code = 128 + next(iter(interruption.args), stopped_by)
    sys.exit(code)


if __name__ == "__main__":
    main()
