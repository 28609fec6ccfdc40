"""How far a sweep has got while its process runs."""

import subprocess
import time
from collections.abc import Sequence
from typing import Protocol

from orchestrator.ledger_records import Training

PATIENCE_SECONDS = 600


class RunningSweep(Protocol):
    """A test's sweep."""

    @property
    def said(self) -> str:
        """What its processes printed."""

    def trainings(self) -> Sequence[Training]:
        """Those in its ledger by now; none while there is no ledger."""


def wait_for_tokens(sweep: RunningSweep, process: subprocess.Popen[bytes], more_than: int = 0) -> int:
    """Until the trainings have come farther than that; answers how far."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (done := sum(one.tokens_done for one in sweep.trainings())) <= more_than:
        assert process.poll() is None and time.monotonic() < deadline, sweep.said
        time.sleep(0.1)
    return done
