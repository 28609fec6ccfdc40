"""Chosen dictionaries in MLflow's registry, and back out of it.

A version's tag is the record that a dictionary is compared with when it is loaded. A version is made after its files
have arrived, with all its tags at once, and gets its alias last: what is cut off leaves no alias and no version.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from orchestrator.addresses import redact_url, sqlite_file
from orchestrator.choice import Choice
from orchestrator.ledger import Ledger
from orchestrator.ledger_records import Study, SweepRecord, Training, without_heads
from orchestrator.status import front_member
from orchestrator.tracking_run import find_or_create_experiment, milliseconds, named, store_errors
from orchestrator.tracking_store import (
    LOCK_FILE,
    SHA256_TAG,
    STUDY_TAG,
    SWEEP_TAG,
    TRAINING_TAG,
    ask_database,
    no_server,
    prepare_client,
    tracking_address,
    unavailable,
)
from orchestrator.trained_dictionary import load_trained
from orchestrator.version_facts import description, provenance
from qkmodel.dictionary import CONFIG_FILE, Dictionary, DictionaryConfig, files_of, read_dictionary_config
from qkmodel.dictionary import load_dictionary as load_folder
from qkmodel.errors import InputError
from qkmodel.files import exclusive
from qkmodel.model_description import model_slug

MODEL_TYPE = "qk-transcoder"
# what a table of versions shows of each; all of it is in the description
_SHOWN_FACTS = (SWEEP_TAG, STUDY_TAG, TRAINING_TAG, SHA256_TAG)

# databases that keep versions in 32 bits fail on larger ones
_REFERENCE = re.compile(r"models:/(?P<name>[^/:@\s]+)(?:@(?P<alias>[\w-]+)|/(?P<version>\d{1,9}))", re.ASCII)
# a version that somebody made by hand may carry all tags
_FOREIGN_SOURCES = ("http:", "https:", "runs:")
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@dataclass(frozen=True)
class Registered:
    """A version of a registered model.

    `is_new` says whether it was made now, `alias_was` which version had the alias before.
    """

    name: str
    version: str
    alias: str
    is_new: bool
    alias_was: str | None

    @property
    def reference(self) -> str:
        return f"models:/{self.name}@{self.alias}"


def registered_name(config: DictionaryConfig) -> str:
    """`qk.smollm2-135m.L08`: one registered model per language model and layer, and `….L08.pairs` for masked ones."""
    name = f"qk.{model_slug(config.model.config)}.L{config.model.layer:02d}"
    return name if config.pair_mask is None else f"{name}.pairs"


def register(tracking: str | None, storage: Path, ledger: Ledger, choices: Sequence[Choice]) -> list[Registered]:
    """Register the chosen dictionaries, or find them registered, and point their aliases to them.

    `tracking` and `storage` as in the sweep file. Raises InputError when a dictionary is damaged or a prompt of MLflow
    has the name of one, before anything is registered, and TrackingUnavailable when MLflow cannot take one now; that
    one then has neither version nor alias.
    """
    address, artifact_root = tracking_address(tracking, storage)
    folders = [ledger.folder / choice.training.dictionary for choice in choices]
    configs = [load_trained(ledger, choice.training).config for choice in choices]
    # against another `choose` on this machine: both would find no version and make one
    with _answered_in_one_line(address), exclusive(storage / LOCK_FILE, lambda holder: None):
        client = _connect(address)
        for config in configs:
            _refuse_prompt(client, address, registered_name(config))
        registration = _Registration(client, address, ledger.sweep(), artifact_root)
        return [registration.of(*one) for one in zip(choices, folders, configs, strict=True)]


def load_dictionary(reference: str, tracking: str | None = None) -> Dictionary:
    """The dictionary that `models:/NAME@ALIAS` or `models:/NAME/VERSION` stands for in MLflow's registry.

    `tracking` is the address of the store; None is what MLFLOW_TRACKING_URI says, or else runs/mlflow.db in the present
    folder. The files are compared with the hash that the registry records; only safetensors and JSON are read. Raises
    InputError when there is no such dictionary or it is not the one that was registered, and TrackingUnavailable when
    MLflow cannot be reached.
    """
    found = _REFERENCE.fullmatch(reference) if isinstance(reference, str) else None
    if found is None:
        shown = str(reference)[:200]
        raise InputError(f"{shown!r} names no dictionary; write models:/NAME@ALIAS or models:/NAME/VERSION")
    address, _ = tracking_address(tracking or os.environ.get("MLFLOW_TRACKING_URI") or None, Path("runs"))
    file = sqlite_file(address)
    if file is not None and not file.is_file():
        raise InputError(f"{file}: no tracking store here; give its address as tracking=, or set MLFLOW_TRACKING_URI")
    with _answered_in_one_line(address):
        client = _connect(address)
        version = _look_up(client, address, reference, **found.groupdict())
        try:
            return _load_version(client, address, version)
        except InputError as error:
            raise InputError(f"{reference}: {error}") from error


def chosen_record(
    ledger: Ledger, choice: Choice, registered: Registered, tracking: str | None, storage: Path
) -> dict[str, Any]:
    """One of what `orchestrate choose --json` prints: what was registered, as what, and how to load it."""
    address, _ = tracking_address(tracking, storage)
    shown = redact_url(address)
    arguments = [json.dumps(registered.reference)]
    if shown == address:
        arguments.append(f"tracking={json.dumps(address, ensure_ascii=False)}")
    return {
        "study_id": choice.status.study.study_id,
        "layer": choice.status.study.layer,
        "reference": registered.reference,
        "version": registered.version,
        "is_new": registered.is_new,
        "alias_was": registered.alias_was,
        "tracking": shown,
        "python": f"from orchestrator import load_dictionary; dictionary = load_dictionary({', '.join(arguments)})",
        **front_member(ledger, choice.training),
    }


def _connect(address: str) -> MlflowClient:
    prepare_client()
    if not address.startswith("http"):
        ask_database(address)
    return MlflowClient(tracking_uri=address, registry_uri=address)


@contextmanager
def _answered_in_one_line(address: str) -> Iterator[None]:
    try:
        yield
    except store_errors() as error:
        raise unavailable(address, error) from error


def _look_up(
    client: MlflowClient, address: str, reference: str, name: str, alias: str | None, version: str | None
) -> ModelVersion:
    try:
        found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
    except MlflowException as error:
        if error.error_code not in _ABSENT:
            raise
        raise InputError(
            f"{reference}: not in the registry of {redact_url(address)}; see orchestrate choose"
        ) from error
    if found.name != name:
        raise no_server(address)
    if SHA256_TAG not in found.tags:
        raise InputError(f"{reference}: was not registered by orchestrate choose: it has no tag {SHA256_TAG}")
    return found


def _refuse_prompt(client: MlflowClient, address: str, name: str) -> None:
    """Prompts lie in the same registry; MLflow makes versions under the name of one that nobody can load."""
    if client.get_prompt(name) is not None:
        raise InputError(
            f"{name}: is the name of a prompt at {redact_url(address)}; delete the prompt, or give another tracking"
        )


def _load_version(client: MlflowClient, address: str, version: ModelVersion) -> Dictionary:
    """What a version holds. Raises InputError as `_download` does, and for a source that `choose` does not give."""
    if version.source.startswith(_FOREIGN_SOURCES):
        raise InputError(f"was not registered by orchestrate choose: its source is {redact_url(version.source)}")
    source = client.get_model_version_download_uri(version.name, version.version)
    return _download(address, source, version.tags[SHA256_TAG])


def _download(address: str, source: str, sha256: str) -> Dictionary:
    """The dictionary at `source`. Raises InputError when its files are gone or are not those that were registered."""
    # a download that fails does not tell a file that is gone from a store that does not answer
    there = {PurePosixPath(one.path).name for one in mlflow.artifacts.list_artifacts(source, tracking_uri=address)}
    with tempfile.TemporaryDirectory() as scratch:

        def fetch(names: Sequence[str]) -> None:
            if gone := [name for name in names if name not in there]:
                raise InputError(f"{gone[0]} is gone from {redact_url(source)}")
            for name in names:
                mlflow.artifacts.download_artifacts(f"{source}/{name}", dst_path=scratch, tracking_uri=address)

        try:
            fetch([CONFIG_FILE])
            # which says what others there are
            config, _ = read_dictionary_config(Path(scratch), sha256)
            fetch([name for name in files_of(config) if name != CONFIG_FILE])
            return load_folder(scratch, sha256)
        except InputError as error:
            found = str(error).replace(f"{scratch}/", "")
            raise InputError(f"{found}; orchestrate choose registers it anew") from error


class _Registration:
    """Registers dictionaries of one sweep. `artifact_root` is None where a server decides."""

    def __init__(self, client: MlflowClient, address: str, sweep: SweepRecord, artifact_root: str | None) -> None:
        self._client = client
        self._address = address
        self._sweep = sweep
        self._artifact_root = artifact_root
        self._experiment = find_or_create_experiment(client, sweep.name, artifact_root)

    def of(self, choice: Choice, folder: Path, config: DictionaryConfig) -> Registered:
        name, sha256 = registered_name(config), choice.training.dictionary_sha256
        found = self._client.search_model_versions(f"name = '{name}' and tags.`{SHA256_TAG}` = '{sha256}'")
        whole = next((one.version for one in found if self._is_whole(one)), None)
        version = self._make_version(name, choice, folder, config) if whole is None else whole
        before = self._client.get_registered_model(name).aliases.get(choice.alias)
        self._client.set_registered_model_alias(name, choice.alias, version)
        return Registered(name, str(version), choice.alias, whole is None, None if before is None else str(before))

    def _is_whole(self, version: ModelVersion) -> bool:
        """Whether the store still has what was registered: its files may have been deleted or changed there."""
        try:
            _load_version(self._client, self._address, version)
        except InputError:
            return False
        return True

    def _make_version(self, name: str, choice: Choice, folder: Path, config: DictionaryConfig) -> str:
        """Upload, and only then make the version. Where MLflow has the training's run, the version belongs to it."""
        client, training = self._client, choice.training
        run_id = self._run_of(training)
        facts = provenance(self._sweep, choice, config)
        params = {key: str(value) for key, value in training.hyperparameters.items() if value is not None}
        metrics = {key: value for key, value in without_heads(training.metrics).items() if value is not None}
        model = self._earlier_model(training.dictionary_sha256)
        if model is None:
            # names of logged models hold no points
            plain = name.replace(".", "-")
            model = client.create_logged_model(self._experiment, plain, run_id, facts, params, MODEL_TYPE)
            named(client, model.model_id)
            try:
                for file in files_of(config):
                    client.log_model_artifact(model.model_id, str(folder / file))
                if run_id is not None:
                    self._show_metrics(run_id, model.model_id, training, metrics)
                client.finalize_logged_model(model.model_id, "READY")
            except store_errors():
                with suppress(*store_errors()):
                    client.finalize_logged_model(model.model_id, "FAILED")
                raise
        _ensure_registered_model(client, name, choice.status.study)
        figures = {key: repr(value) for key, value in metrics.items()}
        tags = {key: facts[key] for key in _SHOWN_FACTS} | {key: figures[key] for key in _shown_metrics(training)}
        text = description(training, figures, params, facts)
        if self._artifact_root is None:
            source = f"models:/{model.model_id}"
            made = client.create_model_version(name, source, run_id, tags, model_id=model.model_id, description=text)
        else:
            # a database store would look a logged model up in the store that is this process's default
            made = client.create_model_version(name, model.artifact_location, run_id, tags, description=text)
        return made.version

    def _earlier_model(self, sha256: str) -> LoggedModel | None:
        """A whole logged model of a dictionary, for which a kill left no version; all others of it are deleted."""
        condition = f"tags.`{SHA256_TAG}` = '{sha256}'"
        whole = None
        for model in self._client.search_logged_models([self._experiment], condition):
            if whole is None and model.status == LoggedModelStatus.READY and self._has_files(model, sha256):
                whole = model
            else:
                self._client.delete_logged_model(model.model_id)
        return whole

    def _has_files(self, model: LoggedModel, sha256: str) -> bool:
        try:
            _download(self._address, model.artifact_location, sha256)
        except InputError:
            return False
        return True

    def _run_of(self, training: Training) -> str | None:
        """The training's run below this sweep's parent run: another storage's sweep may be in the same experiment."""
        parent = self._find_run({SWEEP_TAG: self._sweep.run_tag})
        return parent and self._find_run({MLFLOW_PARENT_RUN_ID: parent, TRAINING_TAG: training.training_id})

    def _find_run(self, tags: Mapping[str, str]) -> str | None:
        condition = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        found = self._client.search_runs([self._experiment], condition, max_results=1)
        return found[0].info.run_id if found else None

    def _show_metrics(self, run_id: str, model_id: str, training: Training, metrics: Mapping[str, float]) -> None:
        """On the logged model's page. The run has the same points, and MLflow keeps one of equal ones."""
        ended, tokens = milliseconds(training.finished), training.tokens_done
        points = [Metric(key, value, ended, tokens, model_id=model_id) for key, value in metrics.items()]
        self._client.log_batch(run_id, metrics=points)


def _shown_metrics(training: Training) -> tuple[str, ...]:
    found = training.objectives
    return found.size, found.kl, found.recovered


def _ensure_registered_model(client: MlflowClient, name: str, study: Study) -> None:
    try:
        what = "QK transcoders, their pairs masked," if study.task == "pair_mask" else "QK transcoders"
        client.create_registered_model(name, description=f"{what} of {study.model}, layer {study.layer}")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
