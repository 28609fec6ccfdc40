"""Delivering to MLflow what it missed, while no driver is at work."""

from pathlib import Path

from orchestrator.driver_lock import AtWork, only_driver
from orchestrator.ledger import Ledger
from orchestrator.starts import refuse_beside_living_driver
from orchestrator.tracking import Tracker
from orchestrator.tracking_notes import end_status
from qkmodel.errors import InputError


def deliver_late(ledger: Ledger, tracking: str | None, storage: Path) -> str:
    """Delivers everything that a sweep owes, and answers where to, without passwords.

    Raises InputError while a driver is at work on the sweep, which delivers itself, and on a machine that does not have
    its folder; TrackingUnavailable.
    """
    ledger.require_folder()
    try:
        with only_driver(ledger.folder):
            refuse_beside_living_driver(ledger)
            tracker = Tracker(tracking, storage, ledger)
            tracker.deliver(end_status(ledger))
            return tracker.address
    except AtWork as error:
        raise InputError(
            f"{error.who} is at work on the sweep in {ledger.storage.shown(ledger.folder)} and delivers by itself; "
            "wait for it or end it"
        ) from error
