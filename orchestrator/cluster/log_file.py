"""Reading a log that another process is still writing."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from qkmodel.errors import InputError

PAUSE_SECONDS = 0.3
CHECK_SECONDS = 3.0
# how long a cluster that has answered may fall silent before following its job ends
HICCUP_SECONDS = 60.0


def follow_file(path: Path, follow: bool, is_over: Callable[[], bool]) -> Iterator[str]:
    """What is in the file; with `follow` also what comes, until `is_over`, which is asked every `CHECK_SECONDS`.

    Raises the InputError of `is_over` once it has been one for longer than a hiccup.
    """
    position, next_check, answered = 0, 0.0, -math.inf
    while True:
        over = not follow
        if follow and time.monotonic() >= next_check:
            try:
                over, answered = is_over(), time.monotonic()
            except InputError:
                if time.monotonic() > answered + HICCUP_SECONDS:
                    raise
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
