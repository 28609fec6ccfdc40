"""Delivers to MLflow beside the trainings, and lets nothing that goes wrong there reach them."""

import logging
import threading

from orchestrator.addresses import redact_url
from orchestrator.tracking import Tracker
from orchestrator.tracking_notes import EndStatus
from orchestrator.tracking_store import TrackingUnavailable

_log = logging.getLogger(__name__)


class TrackingThread:
    """Delivers every `interval` seconds and once at the end, and remembers the last error."""

    def __init__(self, tracker: Tracker, interval: float = 5.0) -> None:
        self._tracker = tracker
        self._interval = interval
        self._stop = threading.Event()
        self._ended: EndStatus = "KILLED"
        self.error: str | None = None
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def stop(self, ended: EndStatus, patience: float) -> str | None:
        """End the thread with a last delivery, which ends the parent run with this status.

        It is waited for `patience` seconds at most; what it does not get through is still owed.
        Returns why the last delivery did not succeed, None where it did.
        """
        self._ended = ended
        self._stop.set()
        self._thread.join(patience)
        if self._thread.is_alive():
            return self.error or f"MLflow at {self._tracker.address} takes more than {patience:g} s to get the rest"
        return self.error

    def _run(self) -> None:
        while not self._stop.is_set():
            self._try_to_deliver(None)
            self._stop.wait(self._interval)
        self._try_to_deliver(self._ended)

    def _try_to_deliver(self, ended: EndStatus | None) -> None:
        try:
            self._tracker.deliver(ended)
            self.error = None
        except TrackingUnavailable as error:
            self.error = str(error)
        except Exception as error:  # noqa: BLE001 - MLflow, alembic and plotly raise what they like; trainings go on
            _log.debug("tracking", exc_info=True)
            reason = str(error).strip().splitlines() or ["no message"]
            self.error = f"MLflow at {self._tracker.address}: {type(error).__name__}: {redact_url(reason[0])}"
