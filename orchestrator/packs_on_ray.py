"""Runs a queue's packs on Ray, and notices when that Ray ends."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray import tune

from orchestrator.pack_queue import PackQueue
from orchestrator.plan import SweepPlan
from orchestrator.ray_connection import RAY_ENDED, Capacity, connected_ray, head_answers
from orchestrator.search.searcher import PackSearcher
from orchestrator.stopping import Stopping
from orchestrator.trainable import PackTrainable

# below the sweep's folder: what a killed driver leaves there, the next start clears away
SCRATCH_FOLDER = ".tune"
CHECK_SECONDS = 2.0
# Tune starts a trial only for a suggestion, so this bounds nothing; the searcher says when it can have one and when
# it is done.
UNLIMITED = 10**9
# Tune's own files and handlers are of no use here: the ledger is the truth, and results are ours to write.
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray would run workers at nice 15, behind everything else on the machine
    "RAY_worker_niceness": "0",
}


class RayStopped(Exception):
    """Ray ended while packs were still to train; the message is one line."""


class _Watch:
    """Looks for used-up budgets, which stop the packs, and for the end of Ray.

    Raises RayStopped once the head or the last node is gone: Tune would wait for it.
    """

    def __init__(self, stopping: Stopping) -> None:
        self._stopping = stopping
        self._next_check = 0.0

    def __call__(self) -> None:
        if time.monotonic() < self._next_check:
            return
        self._next_check = time.monotonic() + CHECK_SECONDS
        self._stopping.check_budget()
        if not head_answers() or not any(node["Alive"] for node in ray.nodes()):
            if self._stopping.signal is not None:
                # both were asked to end, as by a signal to the whole process group
                raise KeyboardInterrupt
            raise RayStopped(RAY_ENDED)


class _EveryStep(tune.Callback):
    """Has the searcher look around at each of Tune's steps: while a pack waits for room it is asked for no other."""

    def __init__(self, searcher: PackSearcher) -> None:
        self._searcher = searcher

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._searcher.look_around()

    def __getstate__(self) -> dict[str, Any]:
        # Tuner pickles its callbacks when it is built; a database connection must not go along
        return {}


def train_packs(plan: SweepPlan, queue: PackQueue, start: int) -> str | None:
    """Trains until the queue is empty, or a budget is used up: then the answer says which one.

    SIGINT and SIGTERM have packs write checkpoints and end, and then raise KeyboardInterrupt; a second one ends the
    process at once. Raises RayStopped, and OSError when storage or ledger take nothing any more.
    """
    os.environ |= _ENVIRONMENT
    resources = plan.config.resources.pack
    stopping = Stopping(queue, plan.folder, start, plan.storage)
    searcher = PackSearcher(queue, Capacity(resources), plan.folder, _Watch(stopping))
    with stopping.on_signals(), _scratch(plan.folder / SCRATCH_FOLDER) as scratch, connected_ray():
        tuner = tune.Tuner(
            tune.with_resources(PackTrainable, {"cpu": resources.cpu, "gpu": resources.gpu}),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=UNLIMITED,
                max_concurrent_trials=UNLIMITED,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name=plan.config.name,
                storage_path=str(scratch),
                verbose=0,
                # one recovery path: the queue's, from the ledger and our own checkpoints
                failure_config=tune.FailureConfig(max_failures=0),
                # of ours, which hold nothing, and which nodes that do not have `scratch` could not keep
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[_EveryStep(searcher)],
            ),
        )
        tuner.fit()
    if stopping.signal is not None:
        raise KeyboardInterrupt(stopping.signal)
    return stopping.budget_line or queue.token_line


def clear_scratch(sweep_folder: Path) -> None:
    """Where nothing is left to train: what a killed driver left."""
    shutil.rmtree(sweep_folder / SCRATCH_FOLDER, ignore_errors=True)


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """An empty folder for what Tune writes and nobody reads."""
    # workers of a killed driver may still be writing there
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
