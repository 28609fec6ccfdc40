"""Reading a log that another process is still writing."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

PAUSE_SECONDS = 0.3
CHECK_SECONDS = 3.0


def follow_file(path: Path, follow: bool, is_over: Callable[[], bool]) -> Iterator[str]:
    """What is in the file; with `follow` also what comes, until `is_over`, which is asked every `CHECK_SECONDS`."""
    position, next_check = 0, 0.0
    while True:
        over = not follow or (time.monotonic() >= next_check and is_over())
        if time.monotonic() >= next_check:
            next_check = time.monotonic() + CHECK_SECONDS
        # read after asking, so that nothing written before the end is missed
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                content = file.read()
            if not over:
                # a line that is being written is left for the next time
                content = content[: content.rfind(b"\n") + 1]
            position += len(content)
            if content:
                yield content.decode(errors="replace")
        if over:
            return
        time.sleep(PAUSE_SECONDS)
