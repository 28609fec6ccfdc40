"""Brings MLflow to what the ledger holds: one parent run per sweep, one child run per training.

MLflow is a view of the ledger. Runs are found again by their tags before they are created, metric points
carry the ledger's own timestamps (MLflow keeps one of equal points) and the ledger notes per run what has
arrived, after it arrived: so a delivery may be cut off anywhere and repeated without leaving duplicates. A slow server
may create a run twice, since MLflow's client asks again after a timeout: all but one are deleted.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from omegaconf import OmegaConf

from orchestrator.addresses import redact_url
from orchestrator.ledger import Ledger
from orchestrator.ledger_records import Training
from orchestrator.pareto import front_trainings
from orchestrator.report import REPORT_FILE
from orchestrator.tracking_fronts import FrontArtifacts
from orchestrator.tracking_notes import COMPLETE, TRAINING, EndStatus, complete_mark, file_mark, has_run
from orchestrator.tracking_run import (
    TrainingRun,
    correct_notes,
    find_or_create_experiment,
    milliseconds,
    named,
    store_errors,
)
from orchestrator.tracking_store import (
    LOCK_FILE,
    STUDY_TAG,
    SWEEP_TAG,
    TRAINING_TAG,
    TrackingUnavailable,
    ask_database,
    prepare_client,
    tracking_address,
    unavailable,
)
from orchestrator.tracking_summary import SweepSummary
from orchestrator.trained_dictionary import way_to_train_anew
from orchestrator.versions import GIT_DIFF_FILE
from qkmodel.files import exclusive

PARENT_TAG = "mlflow.parentRunId"
NO_GIT_DIFF = "the latest start was without --git-diff, or the checkout unchanged\n"


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
        Raises TrackingUnavailable; what had arrived by then is not sent again. So it does, after all else was
        delivered, when a dictionary that belongs there is gone or damaged.
        """
        # whatever cuts this delivery off: the next one looks everything up anew
        client, self._client = self._client, None
        try:
            client = client or self._connect()
            lost = self._deliver(client, ended)
        except store_errors() as error:
            raise unavailable(self._uri, error) from error
        self._client = client
        if lost:
            (training, damage), others = lost[0], f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
            folder = self._ledger.folder / training.dictionary
            raise TrackingUnavailable(
                f"{training.label}{others}: {damage}; {way_to_train_anew(folder, self._ledger.storage)}"
            )

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
        self._parent = self._find_parent(client)
        if not self._parent:
            tags = {SWEEP_TAG: sweep.run_tag}
            run = client.create_run(self._experiment, milliseconds(sweep.created), tags, sweep.name)
            self._parent = named(client, run.info.run_id)
        self._adopt_orphans(client)
        self._runs = self._find_children(client)
        # of a store that was emptied, of another store, of runs that were deleted
        self._ledger.forget_delivered({self._parent, *self._runs.values()})
        self._fronts = FrontArtifacts(client, self._ledger, self._parent)
        self._summary = SweepSummary(client, self._ledger, self._experiment, self._parent)
        return client

    def _find_parent(self, client: MlflowClient) -> str:
        """Empty where there is none."""
        tag = self._ledger.sweep().run_tag
        run = self._runs_by(client, SWEEP_TAG, f"tags.`{SWEEP_TAG}` = '{tag}'").get(tag)
        if run is None:
            return ""
        notes = self._ledger.delivered().get(run.info.run_id, {})
        if notes.get("status", "RUNNING") != run.info.status:
            self._ledger.note_delivered(run.info.run_id, "status", run.info.status)
        return run.info.run_id

    def _find_children(self, client: MlflowClient) -> dict[str, str]:
        found = self._runs_by(client, TRAINING_TAG, f"tags.`{PARENT_TAG}` = '{self._parent}'")
        notes = self._ledger.delivered()
        for run in found.values():
            correct_notes(self._ledger, run, notes.get(run.info.run_id, {}))
        return {training_id: run.info.run_id for training_id, run in found.items()}

    def _adopt_orphans(self, client: MlflowClient) -> None:
        """Puts trainings below the parent run whose former one was deleted: MLflow leaves them where they were."""
        notes = self._ledger.delivered()
        # asked once for each parent: another storage's sweep of this name may be in the same experiment
        was_parent = cache(partial(self._was_parent, client))
        for run in list(_search(client, self._experiment, f"tags.`{PARENT_TAG}` != '{self._parent}'")):
            is_noted = TRAINING in notes.get(run.info.run_id, {})
            if TRAINING_TAG in run.data.tags and (is_noted or was_parent(run.data.tags[PARENT_TAG])):
                client.set_tag(run.info.run_id, PARENT_TAG, self._parent)

    def _was_parent(self, client: MlflowClient, run_id: str) -> bool:
        try:
            return client.get_run(run_id).data.tags.get(SWEEP_TAG) == self._ledger.sweep().run_tag
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def _runs_by(self, client: MlflowClient, tag: str, condition: str) -> dict[str, Run]:
        """Values of a tag that is to be one run's alone, and that run: where several have it, all but one go."""
        notes = self._ledger.delivered()
        found: dict[str, list[Run]] = {}
        for run in _search(client, self._experiment, condition):
            if tag in run.data.tags:
                found.setdefault(run.data.tags[tag], []).append(run)
        runs = {}
        for value, same in found.items():
            # the first one where nothing has arrived in any
            runs[value] = max(same, key=lambda run: len(notes.get(run.info.run_id, ())))
            for run in same:
                if run is not runs[value]:
                    client.delete_run(run.info.run_id)
        return runs

    def _deliver(self, client: MlflowClient, ended: EndStatus | None) -> list[tuple[Training, str]]:
        """The trainings whose dictionary is to be sent and gone or damaged, and how."""
        trainings = self._ledger.trainings()
        mark = complete_mark(self._ledger, trainings, ended or "RUNNING")
        notes = self._ledger.delivered()
        parent_notes = notes.get(self._parent, {})
        self._deliver_sweep(client, parent_notes)
        lost = self._deliver_trainings(client, trainings, notes)
        has_fronts = self._fronts.deliver(trainings, parent_notes, is_last=ended is not None)
        self._summary.deliver(parent_notes)
        self._deliver_report(client, parent_notes)
        if ended is not None:
            # without those that a slow server has made twice since the first look
            self._parent, self._runs = self._find_parent(client), self._find_children(client)
        self._deliver_status(client, parent_notes, ended)
        if has_fronts and not lost and parent_notes.get(COMPLETE) != mark:
            self._ledger.note_delivered(self._parent, COMPLETE, mark)
        return lost

    def _deliver_trainings(
        self, client: MlflowClient, trainings: Sequence[Training], notes: dict[str, dict[str, str]]
    ) -> list[tuple[Training, str]]:
        """Those whose dictionary is to be sent and gone or damaged, and how."""
        studies = {study.study_id: study for study in self._ledger.studies()}
        members: set[str] = set()
        for study_id in studies:
            in_study = [training for training in trainings if training.study_id == study_id]
            members.update(training.training_id for training in front_trainings(in_study))
        lost = []
        for training in trainings:
            if not has_run(training):
                continue
            run_id = self._runs.get(training.training_id) or self._create_run(client, training)
            if TRAINING not in notes.get(run_id, {}):
                self._ledger.note_delivered(run_id, TRAINING, training.training_id)
            run = TrainingRun(client, self._ledger, run_id, notes.get(run_id, {}))
            damage = run.deliver(studies[training.study_id], training, is_member=training.training_id in members)
            if damage is not None:
                lost.append((training, damage))
        return lost

    def _create_run(self, client: MlflowClient, training: Training) -> str:
        tags = {
            PARENT_TAG: self._parent,
            TRAINING_TAG: training.training_id,
            STUDY_TAG: training.study_id,
            "layer": str(training.layer),
        }
        started = milliseconds(training.started or training.created)
        run = client.create_run(self._experiment, started, tags, training.label)
        self._runs[training.training_id] = named(client, run.info.run_id)
        return run.info.run_id

    def _deliver_sweep(self, client: MlflowClient, notes: dict[str, str]) -> None:
        sweep = self._ledger.sweep()
        # by the library that reads sweep files: others leave 0e0 unquoted, which it takes for a number
        text = OmegaConf.to_yaml(OmegaConf.create(sweep.config))
        self._deliver_git_diff(client, notes)
        mark = json.dumps([text, sweep.git_sha, sweep.versions, sweep.facts], sort_keys=True)
        if notes.get("sweep") == mark:
            return
        client.log_text(self._parent, text, "sweep.yaml")
        client.log_text(self._parent, OmegaConf.to_yaml({"versions": sweep.versions, **sweep.facts}), "start.yaml")
        if sweep.git_sha is not None:
            client.set_tag(self._parent, "mlflow.source.git.commit", sweep.git_sha)
        self._ledger.note_delivered(self._parent, "sweep", mark)

    def _deliver_git_diff(self, client: MlflowClient, notes: dict[str, str]) -> None:
        diff = self._ledger.folder / GIT_DIFF_FILE
        changes = diff.read_text() if diff.is_file() else ""
        if notes.get("git diff", "") != changes:
            # MLflow's client cannot take an artifact away
            client.log_text(self._parent, changes or NO_GIT_DIFF, GIT_DIFF_FILE)
            self._ledger.note_delivered(self._parent, "git diff", changes)

    def _deliver_report(self, client: MlflowClient, notes: dict[str, str]) -> None:
        page = self._ledger.folder / REPORT_FILE
        mark = file_mark(page)
        if mark and notes.get("report") != mark:
            client.log_artifact(self._parent, page)
            self._ledger.note_delivered(self._parent, "report", mark)

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


def _search(client: MlflowClient, experiment: str, condition: str) -> Iterator[Run]:
    token = None
    while True:
        page = client.search_runs([experiment], condition, order_by=["attributes.start_time"], page_token=token)
        yield from page
        token = page.token
        if not token:
            return
