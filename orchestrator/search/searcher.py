"""The adapter between Ray Tune and the pack queue: a trial is a pack."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from orchestrator.ledger_connection import MENDED
from orchestrator.pack_order import MemberReport
from orchestrator.pack_queue import PackQueue
from orchestrator.starts import TakenOver
from qkmodel.errors import InputError


class PackSearcher(Searcher):
    """Suggests packs to Tune and passes their reports on.

    Decisions and records are the queue's. `capacity` says how many packs may run at present; Tune asks
    again when a suggestion was None. `watch` raises what has to end the run.
    """

    def __init__(
        self, queue: PackQueue, capacity: Callable[[], int], sweep_folder: Path, watch: Callable[[], None]
    ) -> None:
        super().__init__()
        self._queue = queue
        self._capacity = capacity
        self._folder = sweep_folder
        self._watch = watch
        self._pack_of: dict[str, str] = {}
        # why the sweep cannot go on: what is raised where Tune hands over a result it takes for a failure of the trial
        self._halted: OSError | InputError | None = None
        # what is in the ledger is another driver's from then on
        self._is_fenced = False

    def look_around(self) -> None:
        """Raises why the sweep cannot go on: OSError for storage that takes nothing any more, InputError for a damaged
        ledger, or what `watch` raises.
        """
        if self._halted is not None:
            raise self._halted
        self._watch()

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        # while no pack runs and none is suggested, Tune does nothing but ask again, for ten minutes
        self.look_around()
        # a queue that stops hands out nothing, and says when it is done: no node is needed for that
        if not self._queue.stopping and len(self._pack_of) >= self._capacity():
            return None
        with self._halting():
            return self._next_pack(trial_id)
        return None

    def _next_pack(self, trial_id: str) -> dict[str, Any] | str | None:
        order = self._queue.next_pack()
        if order is None:
            return None
        if order == "finished":
            return Searcher.FINISHED
        self._pack_of[trial_id] = order.pack_id
        return {"order": order.model_dump_json()}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if self._is_fenced:
            return
        reports = [MemberReport.model_validate(report) for report in result["reports"]]
        with self._halting():
            self._queue.record(self._pack_of[trial_id], reports)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        # Tune hands a finished trial's last result to this method only
        reason = "its worker died"
        if error and not self._folder.is_dir():
            # workers die of that, too
            self._halt(OSError(f"{self._folder}: the folder is gone; {MENDED}"))
        if result is not None and not error:
            self.on_trial_result(trial_id, result)
            reason = result.get("error")
            self._look_for_halt(result)
        pack_id = self._pack_of.pop(trial_id)
        if self._is_fenced:
            return
        with self._halting():
            self._queue.end(pack_id, None if self._halted is not None else reason)

    def _look_for_halt(self, result: Mapping[str, Any]) -> None:
        if result.get("fenced"):
            self._halt(TakenOver())
        elif result.get("storage_error") is not None:
            self._halt(OSError(f"{result['storage_error']}; {MENDED}"))

    @contextlib.contextmanager
    def _halting(self) -> Iterator[None]:
        try:
            yield
        except (OSError, InputError) as error:
            # the latter: a ledger whose file is damaged
            self._halt(error)

    def _halt(self, error: OSError | InputError) -> None:
        self._queue.stopping = True
        self._halted = self._halted or error
        self._is_fenced = self._is_fenced or isinstance(error, TakenOver)

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
