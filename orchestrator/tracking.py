"""Brings MLflow to what the ledger holds: one parent run per sweep, one child run per training.

MLflow is a view of the ledger. Runs are found again by their tags before they are created, metric points
carry the ledger's own timestamps (MLflow keeps one of equal points) and the ledger notes per run what has
arrived, after it arrived: so a delivery may be cut off anywhere and repeated without leaving duplicates.
"""

import json
import logging
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from omegaconf import OmegaConf
from sqlalchemy import create_engine, inspect
from sqlalchemy.exc import SQLAlchemyError

from orchestrator.addresses import redact_url
from orchestrator.figures import all_fronts_png, front_html, front_png
from orchestrator.ledger import Ledger, State, Study, Training
from orchestrator.pareto import front_trainings
from qkmodel.errors import InputError

# MLflow's own limits for one batch
MAX_METRICS, MAX_PARAMS = 1000, 100
MAX_PARAM_CHARACTERS = 6000

SWEEP_TAG = "qk.sweep"
TRAINING_TAG = "qk.training_id"
PARENT_TAG = "mlflow.parentRunId"
TABLES_TAG = "mlflow.loggedArtifacts"

_RUN_STATUS: dict[State, str] = {
    "open": "SCHEDULED",
    "running": "RUNNING",
    "finished": "FINISHED",
    "failed": "FAILED",
}
# a dead server then costs seconds instead of minutes; what the user set stays
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}

_log = logging.getLogger(__name__)


class TrackingUnavailable(Exception):
    """MLflow could not be reached or refused; the message is one line without passwords."""


def tracking_address(tracking: str | None, storage: Path) -> tuple[str, str | None]:
    """(MLflow's tracking address, artifact root): the root is None where a server decides.

    Without `tracking` it is an SQLite file in `storage`. Raises InputError for an address of a kind that
    MLflow cannot keep runs at.
    """
    artifact_root = (storage.absolute() / "mlflow-artifacts").as_uri()
    if tracking is None:
        return f"sqlite:///{storage.absolute() / 'mlflow.db'}", artifact_root
    scheme = tracking.partition("://")[0] if "://" in tracking else ""
    if scheme in ("http", "https"):
        return tracking, None
    if scheme.partition("+")[0] in ("sqlite", "postgresql", "mysql", "mssql"):
        return tracking, artifact_root
    raise InputError(
        f"tracking: {redact_url(tracking)!r} is not an MLflow address; "
        "give http(s)://HOST:PORT of a server, sqlite:///PATH, or null for a file beside the sweeps"
    )


class Tracker:
    """Delivers one sweep's ledger. Not for several threads at once, nor for several processes."""

    def __init__(self, tracking: str | None, storage: Path, ledger: Ledger) -> None:
        """`tracking` as in the sweep file. Contacts nothing yet; raises InputError like tracking_address."""
        self._uri, self._artifact_root = tracking_address(tracking, storage)
        self._ledger = ledger
        self._client: MlflowClient | None = None
        self._parent = ""
        self._experiment = ""
        # training id -> run id, as MLflow knows them
        self._runs: dict[str, str] = {}
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)

    @property
    def address(self) -> str:
        """Where the runs are kept, without passwords."""
        return redact_url(self._uri)

    def deliver(self, closing: bool = False) -> None:
        """Deliver what MLflow does not hold yet.

        `closing` ends the parent run: FINISHED, or KILLED while trainings are open or running.
        Raises TrackingUnavailable; what had arrived by then is not sent again.
        """
        try:
            if self._client is None:
                self._client = self._connect()
            self._deliver(self._client, closing)
        except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
            # the next delivery looks everything up anew
            self._client = None
            reason = str(error).strip().splitlines() or [type(error).__name__]
            message = f"MLflow at {self.address} cannot be used now: {redact_url(reason[0])}"
            raise TrackingUnavailable(message) from error

    def _connect(self) -> MlflowClient:
        """Find or create the experiment and the parent run, and find the children there are."""
        if self._artifact_root is not None:
            # asked first because MLflow itself retries a dead database for minutes
            engine = create_engine(self._uri)
            inspect(engine).get_table_names()
            engine.dispose()
        client = MlflowClient(tracking_uri=self._uri)
        sweep = self._ledger.sweep()
        experiment = client.get_experiment_by_name(sweep.name)
        if experiment is None:
            location = self._artifact_root and f"{self._artifact_root}/{sweep.name}"
            self._experiment = client.create_experiment(sweep.name, artifact_location=location)
        else:
            self._experiment = experiment.experiment_id
        # a sweep of the same name in another storage, or begun afresh, has a parent run of its own
        tag = f"{sweep.name} {sweep.created.isoformat()}"
        parents = _search(client, self._experiment, f"tags.`{SWEEP_TAG}` = '{tag}'")
        self._parent = next((run.info.run_id for run in parents), "")
        if not self._parent:
            started = _milliseconds(sweep.created)
            run = client.create_run(self._experiment, started, {SWEEP_TAG: tag}, sweep.name)
            self._parent = run.info.run_id
        children = _search(client, self._experiment, f"tags.`{PARENT_TAG}` = '{self._parent}'")
        self._runs = {run.data.tags[TRAINING_TAG]: run.info.run_id for run in children if TRAINING_TAG in run.data.tags}
        return client

    def _deliver(self, client: MlflowClient, closing: bool) -> None:
        trainings = self._ledger.trainings()
        notes = self._ledger.delivered()
        parent_notes = notes.get(self._parent, {})
        self._deliver_sweep(client, parent_notes)
        members: set[str] = set()
        for study in self._ledger.studies():
            in_study = [training for training in trainings if training.study_id == study.study_id]
            members.update(training.training_id for training in front_trainings(in_study))
        for training in trainings:
            if training.attempts == 0 and training.state == "open":
                continue
            run_id = self._runs.get(training.training_id) or self._create_run(client, training)
            child = _Child(client, self._ledger, run_id, notes.get(run_id, {}))
            child.deliver(training, is_member=training.training_id in members)
        for study in self._ledger.studies():
            in_study = [training for training in trainings if training.study_id == study.study_id]
            self._deliver_front(client, study, in_study, parent_notes)
        self._deliver_overview(client, trainings, parent_notes)
        self._deliver_status(client, trainings, parent_notes, closing)

    def _create_run(self, client: MlflowClient, training: Training) -> str:
        tags = {PARENT_TAG: self._parent, TRAINING_TAG: training.training_id, "layer": str(training.layer)}
        started = _milliseconds(training.started or training.created)
        run = client.create_run(self._experiment, started, tags, training.label)
        self._runs[training.training_id] = run.info.run_id
        return run.info.run_id

    def _deliver_sweep(self, client: MlflowClient, notes: dict[str, str]) -> None:
        sweep = self._ledger.sweep()
        # by the library that reads sweep files: others leave 0e0 unquoted, which it takes for a number
        text = OmegaConf.to_yaml(OmegaConf.create(sweep.config))
        mark = json.dumps([text, sweep.git_sha, sweep.versions], sort_keys=True)
        if notes.get("sweep") == mark:
            return
        client.log_text(self._parent, text, "sweep.yaml")
        tags = {f"version.{package}": version for package, version in sweep.versions.items()}
        if sweep.git_sha is not None:
            tags["mlflow.source.git.commit"] = sweep.git_sha
        client.log_batch(self._parent, tags=[RunTag(key, value) for key, value in tags.items()])
        self._ledger.note_delivered(self._parent, "sweep", mark)

    def _deliver_front(
        self, client: MlflowClient, study: Study, trainings: Sequence[Training], notes: dict[str, str]
    ) -> None:
        """Figures and table of a study, whenever another of its trainings has finished."""
        finished = sorted(training.training_id for training in trainings if training.state == "finished")
        mark, item = json.dumps(finished), f"front {study.study_id}"
        if not finished or notes.get(item) == mark:
            return
        name = f"L{study.layer:02d}"
        same_layer = [other.study_id for other in self._ledger.studies() if other.layer == study.layer]
        if len(same_layer) > 1:
            name += f"-{study.study_id[:8]}"
        title = f"{self._ledger.sweep().name}, layer {study.layer}: KL recovered against sparsity"
        client.log_figure(self._parent, front_png(trainings, title), f"fronts/{name}.png")
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / f"{name}.html"
            front_html(trainings, title).write_html(page, include_plotlyjs=True)
            client.log_artifact(self._parent, page, "fronts")
        self._replace_table(client, f"fronts/{name}.json", front_trainings(trainings))
        self._ledger.note_delivered(self._parent, item, mark)

    def _deliver_overview(self, client: MlflowClient, trainings: Sequence[Training], notes: dict[str, str]) -> None:
        """All studies on one picture, whenever another training has finished."""
        studies = self._ledger.studies()
        finished = [training for training in trainings if training.state == "finished"]
        mark = json.dumps(sorted(training.training_id for training in finished))
        if len(studies) < 2 or not finished or notes.get("overview") == mark:
            return
        rows = {
            f"layer {study.layer}": [training for training in finished if training.study_id == study.study_id]
            for study in studies
        }
        title = f"{self._ledger.sweep().name}: KL recovered against sparsity"
        client.log_figure(self._parent, all_fronts_png(rows, title), "fronts/all.png")
        self._ledger.note_delivered(self._parent, "overview", mark)

    def _replace_table(self, client: MlflowClient, path: str, members: Sequence[Training]) -> None:
        """Like log_table, which would append to the table that is there."""
        rows = [_table_row(training) for training in members]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        data = [[row.get(name) for name in columns] for row in rows]
        client.log_dict(self._parent, {"columns": columns, "data": data}, path)
        tables = json.loads(client.get_run(self._parent).data.tags.get(TABLES_TAG, "[]"))
        entry = {"path": path, "type": "table"}
        if entry not in tables:
            client.set_tag(self._parent, TABLES_TAG, json.dumps([*tables, entry]))

    def _deliver_status(
        self, client: MlflowClient, trainings: Sequence[Training], notes: dict[str, str], closing: bool
    ) -> None:
        is_unfinished = any(training.state in ("open", "running") for training in trainings)
        status = ("KILLED" if is_unfinished else "FINISHED") if closing else "RUNNING"
        if notes.get("status", "RUNNING") == status:
            return
        if closing:
            client.set_terminated(self._parent, status)
        else:
            client.update_run(self._parent, status)
        self._ledger.note_delivered(self._parent, "status", status)


class _Child:
    """One training's run. `notes` is what the ledger says has arrived there."""

    def __init__(self, client: MlflowClient, ledger: Ledger, run_id: str, notes: dict[str, str]) -> None:
        self._client = client
        self._ledger = ledger
        self._run_id = run_id
        self._notes = notes

    def deliver(self, training: Training, is_member: bool) -> None:
        if "params" not in self._notes:
            self._deliver_params(training)
        # a finished training reports no more
        if not self._notes.get("status", "").startswith("FINISHED"):
            self._deliver_reports(training)
            self._deliver_state(training)
        if is_member and "dictionary" not in self._notes:
            self._deliver_dictionary(training)
        self._deliver_membership(is_member)

    def _note(self, item: str, value: str) -> None:
        self._ledger.note_delivered(self._run_id, item, value)

    def _deliver_params(self, training: Training) -> None:
        values = {"layer": training.layer, **training.hyperparameters}
        params = [Param(name, str(value)[:MAX_PARAM_CHARACTERS]) for name, value in values.items() if value is not None]
        for batch in _batches(params, MAX_PARAMS):
            self._client.log_batch(self._run_id, params=batch)
        self._note("params", "all")

    def _deliver_reports(self, training: Training) -> None:
        reports = self._ledger.reports(training.training_id, after=int(self._notes.get("reports", 0)))
        for batch in _batches(reports, MAX_METRICS):
            metrics = [
                Metric(report.name, report.value, _milliseconds(report.recorded), report.tokens)
                for report in batch
                if report.value is not None
            ]
            self._client.log_batch(self._run_id, metrics=metrics)
            self._note("reports", str(batch[-1].report_id))

    def _deliver_state(self, training: Training) -> None:
        """The run's status; with `finished` also the final metrics, with `failed` also the reason."""
        status = _RUN_STATUS[training.state]
        mark = f"{status} {training.attempts}"
        if self._notes.get("status") == mark:
            return
        tags = [RunTag("state", training.state)]
        if training.error is not None:
            tags.append(RunTag("error", training.error[:MAX_PARAM_CHARACTERS]))
        if training.dictionary_sha256 is not None:
            tags.append(RunTag("qk.dictionary_sha256", training.dictionary_sha256))
        ended = _milliseconds(training.finished) if training.finished is not None else None
        final = [
            Metric(name, value, ended, training.tokens_done)
            for name, value in training.metrics.items()
            if value is not None
        ]
        self._client.log_batch(self._run_id, tags=tags)
        if training.error is None and self._notes.get("status", "").startswith("FAILED"):
            self._delete_tag("error")
        for batch in _batches(final, MAX_METRICS):
            self._client.log_batch(self._run_id, metrics=batch)
        if ended is None:
            self._client.update_run(self._run_id, status)
        else:
            self._client.set_terminated(self._run_id, status, ended)
        self._note("status", mark)

    def _deliver_dictionary(self, training: Training) -> None:
        path = self._ledger.folder / training.dictionary
        if not path.exists():
            _log.warning("%s: its dictionary %s is gone, so MLflow does not get it", training.label, path)
        elif path.is_dir():
            self._client.log_artifacts(self._run_id, path, "dictionary")
        else:
            self._client.log_artifact(self._run_id, path, "dictionary")
        self._note("dictionary", training.dictionary_sha256 or "")

    def _deliver_membership(self, is_member: bool) -> None:
        mark = "true" if is_member else "false"
        if self._notes.get("pareto", "false") == mark:
            return
        if is_member:
            self._client.set_tag(self._run_id, "pareto", "true")
        else:
            self._delete_tag("pareto")
        self._note("pareto", mark)

    def _delete_tag(self, name: str) -> None:
        # an earlier delivery may have got this far
        if name in self._client.get_run(self._run_id).data.tags:
            self._client.delete_tag(self._run_id, name)


class TrackingThread:
    """Delivers every `interval` seconds beside the trainings, and remembers the last error."""

    def __init__(self, tracker: Tracker, interval: float = 5.0) -> None:
        self._tracker = tracker
        self._interval = interval
        self._stop = threading.Event()
        self.error: str | None = None
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def stop(self) -> str | None:
        """End the thread, deliver once more and end the parent run.

        Returns the error of the last delivery, None where it succeeded.
        """
        self._stop.set()
        self._thread.join()
        self._try_to_deliver(closing=True)
        return self.error

    def _run(self) -> None:
        while not self._stop.is_set():
            self._try_to_deliver(closing=False)
            self._stop.wait(self._interval)

    def _try_to_deliver(self, closing: bool) -> None:
        try:
            self._tracker.deliver(closing)
            self.error = None
        except TrackingUnavailable as error:
            self.error = str(error)


def _search(client: MlflowClient, experiment: str, condition: str) -> Iterator[Any]:
    token = None
    while True:
        page = client.search_runs([experiment], condition, order_by=["attributes.start_time"], page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _batches(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _milliseconds(time: datetime) -> int:
    return int(time.timestamp() * 1000)


def _table_row(training: Training) -> dict[str, Any]:
    metrics = {name: value for name, value in training.metrics.items() if not name.startswith("kl_head_")}
    return {"training": training.label, **training.hyperparameters, **metrics, "id": training.training_id}
