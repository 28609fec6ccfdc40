"""One training as an MLflow run: params, metric points, state, and the dictionary of a member of a front."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from google.protobuf.json_format import ParseError
from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from orchestrator.addresses import redact_url
from orchestrator.ledger import Ledger
from orchestrator.ledger_records import HEAD_PREFIXES, Study, Training
from orchestrator.tracking_notes import REPORTS, RUN_STATUS, STATUS, has_ended_there, status_mark
from orchestrator.tracking_store import SHA256_TAG, TrackingUnavailable, no_server
from orchestrator.trained_dictionary import dictionary_folder
from qkmodel.dictionary import find_damage

# of clients of object stores, which MLflow's client imports where artifacts lie there
_OBJECT_STORE_ERRORS = (
    ("boto3.exceptions", "Boto3Error"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("google.api_core.exceptions", "GoogleAPIError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
)
# MLflow's own limits for one batch
MAX_METRICS, MAX_PARAMS = 1000, 100
MAX_PARAM_CHARACTERS = 6000


def store_errors() -> tuple[type[Exception], ...]:
    """What MLflow's client raises where a store is away, refuses, or is none. To be asked once it has raised."""
    loaded = [(sys.modules.get(module), name) for module, name in _OBJECT_STORE_ERRORS]
    others = [getattr(module, name) for module, name in loaded if module is not None]
    return (MlflowException, SQLAlchemyError, OSError, ImportError, ParseError, *others)


class TrainingRun:
    """The run of one training. `notes` is what the ledger says has arrived there."""

    def __init__(self, client: MlflowClient, ledger: Ledger, run_id: str, notes: dict[str, str]) -> None:
        self._client = client
        self._ledger = ledger
        self._run_id = run_id
        self._notes = notes

    def deliver(self, study: Study, training: Training, is_member: bool) -> str | None:
        """Deliver what the run does not hold yet; `is_member` says whether the training is on its study's front.

        Where its dictionary belongs there and is gone or damaged, the answer says so in words.
        """
        if "params" not in self._notes:
            self._deliver_params(study, training)
        if not has_ended_there(training, self._notes):
            self._deliver_reports(training)
            self._deliver_state(training)
        self._deliver_membership(is_member)
        return self._deliver_dictionary(training) if is_member else None

    def _note(self, item: str, value: str) -> None:
        self._ledger.note_delivered(self._run_id, item, value)

    def _deliver_params(self, study: Study, training: Training) -> None:
        values = {
            "layer": training.layer,
            "model": study.model,
            "corpus": study.corpus,
            "context": study.identity["corpus"]["context"],
            "tokens": study.identity["training"]["tokens"],
            "sweep_seed": study.identity["seed"],
            **training.hyperparameters,
        }
        params = [Param(name, str(value)[:MAX_PARAM_CHARACTERS]) for name, value in values.items() if value is not None]
        for batch in batches(params, MAX_PARAMS):
            self._client.log_batch(self._run_id, params=batch)
        self._note("params", "all")

    def _deliver_reports(self, training: Training) -> None:
        reports = self._ledger.reports(training.training_id, after=int(self._notes.get(REPORTS, 0)))
        for batch in batches(reports, MAX_METRICS):
            metrics = [
                Metric(report.name, report.value, milliseconds(report.recorded), report.tokens)
                for report in batch
                if report.value is not None
            ]
            self._client.log_batch(self._run_id, metrics=metrics)
            self._note(REPORTS, str(batch[-1].report_id))

    def _deliver_state(self, training: Training) -> None:
        """The run's status; with `finished` also the final metrics, with `failed` also the reason."""
        status, mark = RUN_STATUS[training.state], status_mark(training)
        if self._notes.get(STATUS) == mark:
            return
        tags = [RunTag("state", training.state)]
        if training.state == "failed":
            tags.append(RunTag("error", training.error[:MAX_PARAM_CHARACTERS]))
        if training.dictionary_sha256 is not None:
            tags.append(RunTag(SHA256_TAG, training.dictionary_sha256))
        ended = milliseconds(training.finished) if training.finished is not None else None
        final = [
            Metric(shown_name(name), value, ended, training.tokens_done)
            for name, value in training.metrics.items()
            if value is not None
        ]
        self._client.log_batch(self._run_id, tags=tags)
        before = self._notes.get(STATUS, "")
        if training.state != "failed" and before.startswith(RUN_STATUS["failed"]):
            self._delete_tag("error")
        if training.state != "finished" and before.startswith(RUN_STATUS["finished"]):
            self._delete_tag(SHA256_TAG)
        for batch in batches(final, MAX_METRICS):
            self._client.log_batch(self._run_id, metrics=batch)
        if ended is None:
            self._client.update_run(self._run_id, status)
        else:
            self._client.set_terminated(self._run_id, status, ended)
        self._note(STATUS, mark)

    def _deliver_dictionary(self, training: Training) -> str | None:
        # what is trained anew has the same hash and lies elsewhere, and what MLflow has may be why it was
        mark = f"{training.dictionary} {training.dictionary_sha256}"
        if self._notes.get("dictionary") == mark:
            return None
        path = dictionary_folder(self._ledger, training)
        damage = find_damage(path, training.dictionary_sha256)
        if damage is None:
            self._client.log_artifacts(self._run_id, path, "dictionary")
            self._note("dictionary", mark)
        return damage

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


def correct_notes(ledger: Ledger, run: Run, notes: Mapping[str, str]) -> None:
    """Has the ledger note which tags a training's run has, where `notes` say something else.

    A delivery may have been cut off between a tag and its note, and what was noted of a store is forgotten while a
    sweep is tracked elsewhere: a tag that nobody knows of would never be taken away.
    """
    tags, run_id = run.data.tags, run.info.run_id
    is_member = "true" if "pareto" in tags else "false"
    if notes.get("pareto", "false") != is_member:
        ledger.note_delivered(run_id, "pareto", is_member)
    for tag, state in (("error", "failed"), (SHA256_TAG, "finished")):
        if tag in tags and not notes.get(STATUS, "").startswith(RUN_STATUS[state]):
            ledger.note_delivered(run_id, STATUS, RUN_STATUS[state])


def find_or_create_experiment(client: MlflowClient, sweep: str, artifact_root: str | None) -> str:
    """The id of a sweep's experiment. A new one's artifacts lie below `artifact_root`; None lets the server decide.

    Raises TrackingUnavailable where somebody has deleted it, and where what answers is not MLflow.
    """
    experiment = client.get_experiment_by_name(sweep)
    if experiment is not None:
        if experiment.lifecycle_stage == LifecycleStage.DELETED:
            raise _deleted(redact_url(client.tracking_uri), sweep, experiment.experiment_id, artifact_root is None)
        return named(client, experiment.experiment_id)
    location = artifact_root and f"{artifact_root}/{sweep}"
    return named(client, client.create_experiment(sweep, artifact_location=location))


def named(client: MlflowClient, identifier: str) -> str:
    """An id that was answered. Raises TrackingUnavailable for none, which MLflow's client reads out of any answer."""
    if not identifier:
        raise no_server(client.tracking_uri)
    return identifier


def _deleted(address: str, sweep: str, experiment: str, is_server: bool) -> TrackingUnavailable:
    store = "(the server's own store)" if is_server else f"'{address}'"
    return TrackingUnavailable(
        f"experiment {sweep} was deleted in MLflow; with MLFLOW_TRACKING_URI='{address}' restore it: "
        f"mlflow experiments restore --experiment-id {experiment}; or remove it for good: "
        f"mlflow gc --experiment-ids {experiment} --backend-store-uri {store}"
    )


def shown_name(metric: str) -> str:
    """What a metric is called in MLflow, whose pages show names with the same first part as a section of their own."""
    return f"heads/{metric}" if metric.startswith(HEAD_PREFIXES) else metric


def milliseconds(time: datetime) -> int:
    """As MLflow counts time."""
    return int(time.timestamp() * 1000)


def batches(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
