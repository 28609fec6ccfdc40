"""Brings MLflow to what the ledger holds: one parent run per sweep, one child run per training.

MLflow is a view of the ledger. Runs are found again by their tags before they are created, metric points
carry the ledger's own timestamps (MLflow keeps one of equal points) and the ledger notes per run what has
arrived, after it arrived: so a delivery may be cut off anywhere and repeated without leaving duplicates.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from omegaconf import OmegaConf
from sqlalchemy.exc import SQLAlchemyError

from orchestrator.addresses import redact_url
from orchestrator.ledger import Ledger
from orchestrator.ledger_tables import Training
from orchestrator.pareto import front_trainings
from orchestrator.tracking_fronts import FrontArtifacts
from orchestrator.tracking_notes import TRAINING, EndStatus, has_run
from orchestrator.tracking_run import TrainingRun, find_or_create_experiment, milliseconds
from orchestrator.tracking_store import (
    LOCK_FILE,
    STUDY_TAG,
    TRAINING_TAG,
    ask_database,
    prepare_client,
    tracking_address,
    unavailable,
)
from orchestrator.tracking_summary import SweepSummary
from orchestrator.versions import GIT_DIFF_FILE
from qkmodel.files import exclusive

SWEEP_TAG = "qk.sweep"
PARENT_TAG = "mlflow.parentRunId"


class Tracker:
    """Delivers one sweep's ledger. Not for several threads at once, nor for several processes."""

    def __init__(self, tracking: str | None, storage: Path, ledger: Ledger) -> None:
        """`tracking` as in the sweep file. Contacts nothing yet; raises InputError like tracking_address."""
        self._uri, self._artifact_root = tracking_address(tracking, storage)
        self._storage = storage
        self._ledger = ledger
        self._client: MlflowClient | None = None
        self._parent = ""
        self._experiment = ""
        # training id -> run id, as MLflow knows them
        self._runs: dict[str, str] = {}
        prepare_client()

    @property
    def address(self) -> str:
        """Where the runs are kept, without passwords."""
        return redact_url(self._uri)

    def deliver(self, ended: EndStatus | None = None) -> None:
        """Deliver what MLflow does not hold yet.

        `ended` ends the parent run: FINISHED, or KILLED when the sweep was interrupted.
        Raises TrackingUnavailable; what had arrived by then is not sent again.
        """
        # whatever cuts this delivery off: the next one looks everything up anew
        client, self._client = self._client, None
        try:
            client = client or self._connect()
            self._deliver(client, ended)
        except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
            raise unavailable(self._uri, error) from error
        self._client = client

    def _connect(self) -> MlflowClient:
        """Find or create the experiment and the parent run, and find the children there are."""
        if self._artifact_root is None:
            return self._connect_alone()
        self._storage.mkdir(parents=True, exist_ok=True)
        # MLflow makes the tables of a new database at the first call, and two processes that do so at once both fail
        with exclusive(self._storage / LOCK_FILE, lambda holder: None):
            ask_database(self._uri)
            return self._connect_alone()

    def _connect_alone(self) -> MlflowClient:
        client = MlflowClient(tracking_uri=self._uri)
        sweep = self._ledger.sweep()
        self._experiment = find_or_create_experiment(client, sweep.name, self._artifact_root)
        # a sweep of the same name in another storage, or begun afresh, has a parent run of its own
        tag = f"{sweep.name} {sweep.created.isoformat()}"
        parents = _search(client, self._experiment, f"tags.`{SWEEP_TAG}` = '{tag}'")
        self._parent = next((run.info.run_id for run in parents), "")
        if not self._parent:
            run = client.create_run(self._experiment, milliseconds(sweep.created), {SWEEP_TAG: tag}, sweep.name)
            self._parent = run.info.run_id
        children = _search(client, self._experiment, f"tags.`{PARENT_TAG}` = '{self._parent}'")
        self._runs = {run.data.tags[TRAINING_TAG]: run.info.run_id for run in children if TRAINING_TAG in run.data.tags}
        self._fronts = FrontArtifacts(client, self._ledger, self._parent)
        self._summary = SweepSummary(client, self._ledger, self._experiment, self._parent)
        return client

    def _deliver(self, client: MlflowClient, ended: EndStatus | None) -> None:
        trainings = self._ledger.trainings()
        notes = self._ledger.delivered()
        parent_notes = notes.get(self._parent, {})
        self._deliver_sweep(client, parent_notes)
        studies = {study.study_id: study for study in self._ledger.studies()}
        members: set[str] = set()
        for study_id in studies:
            in_study = [training for training in trainings if training.study_id == study_id]
            members.update(training.training_id for training in front_trainings(in_study))
        for training in trainings:
            if not has_run(training):
                continue
            run_id = self._runs.get(training.training_id) or self._create_run(client, training)
            if TRAINING not in notes.get(run_id, {}):
                self._ledger.note_delivered(run_id, TRAINING, training.training_id)
            run = TrainingRun(client, self._ledger, run_id, notes.get(run_id, {}))
            run.deliver(studies[training.study_id], training, is_member=training.training_id in members)
        self._fronts.deliver(trainings, parent_notes, is_last=ended is not None)
        self._summary.deliver(parent_notes)
        self._deliver_status(client, parent_notes, ended)

    def _create_run(self, client: MlflowClient, training: Training) -> str:
        tags = {
            PARENT_TAG: self._parent,
            TRAINING_TAG: training.training_id,
            STUDY_TAG: training.study_id,
            "layer": str(training.layer),
        }
        started = milliseconds(training.started or training.created)
        run = client.create_run(self._experiment, started, tags, training.label)
        self._runs[training.training_id] = run.info.run_id
        return run.info.run_id

    def _deliver_sweep(self, client: MlflowClient, notes: dict[str, str]) -> None:
        sweep = self._ledger.sweep()
        # by the library that reads sweep files: others leave 0e0 unquoted, which it takes for a number
        text = OmegaConf.to_yaml(OmegaConf.create(sweep.config))
        diff = self._ledger.folder / GIT_DIFF_FILE
        changes = diff.read_text() if diff.is_file() else ""
        mark = json.dumps([text, sweep.git_sha, sweep.versions, sweep.facts, changes], sort_keys=True)
        if notes.get("sweep") == mark:
            return
        client.log_text(self._parent, text, "sweep.yaml")
        client.log_text(self._parent, OmegaConf.to_yaml({"versions": sweep.versions, **sweep.facts}), "start.yaml")
        if changes:
            client.log_text(self._parent, changes, GIT_DIFF_FILE)
        if sweep.git_sha is not None:
            client.set_tag(self._parent, "mlflow.source.git.commit", sweep.git_sha)
        self._ledger.note_delivered(self._parent, "sweep", mark)

    def _deliver_status(self, client: MlflowClient, notes: dict[str, str], ended: EndStatus | None) -> None:
        status = ended or "RUNNING"
        if notes.get("status", "RUNNING") == status:
            return
        if ended is not None:
            # a sweep that is delivered late did not last until now
            at = max(filter(None, (one.finished for one in self._ledger.trainings())), default=None)
            is_over = ended == "FINISHED" and at is not None
            client.set_terminated(self._parent, status, milliseconds(at) if is_over else None)
        else:
            client.update_run(self._parent, status)
        self._ledger.note_delivered(self._parent, "status", status)


def _search(client: MlflowClient, experiment: str, condition: str) -> Iterator[Any]:
    token = None
    while True:
        page = client.search_runs([experiment], condition, order_by=["attributes.start_time"], page_token=token)
        yield from page
        token = page.token
        if not token:
            return
