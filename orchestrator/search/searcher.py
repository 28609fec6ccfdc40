"""The adapter between Ray Tune and the pack queue: a trial is a pack."""

from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from orchestrator.pack_order import MemberReport
from orchestrator.pack_queue import PackQueue


class PackSearcher(Searcher):
    """Suggests packs to Tune and passes their reports on.

    Decisions and records are the queue's. `capacity` says how many packs may run at present; Tune asks
    again when a suggestion was None.
    """

    def __init__(self, queue: PackQueue, capacity: Callable[[], int]) -> None:
        super().__init__()
        self._queue = queue
        self._capacity = capacity
        self._pack_of: dict[str, str] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if len(self._pack_of) >= self._capacity():
            return None
        order = self._queue.next_pack()
        if order is None:
            return None
        if order == "finished":
            return Searcher.FINISHED
        self._pack_of[trial_id] = order.pack_id
        return {"order": order.model_dump_json()}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        reports = [MemberReport.model_validate(report) for report in result["reports"]]
        self._queue.record(self._pack_of[trial_id], reports)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        # Tune hands a finished trial's last result to this method only
        reason = "its worker died"
        if result is not None and not error:
            self.on_trial_result(trial_id, result)
            reason = result.get("error")
        self._queue.end(self._pack_of.pop(trial_id), reason)

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Tells Tune that this searcher limits itself."""
        return True

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the only truth, and Tune's snapshots are never read."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing; see `save`."""

    def __getstate__(self) -> dict[str, Any]:
        # Tuner pickles the searcher when it is built; a database connection must not go along
        return {}
