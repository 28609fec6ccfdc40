"""Where MLflow keeps runs and registered dictionaries, and how it is asked: no long waits, one line when it fails."""

import logging
import os
import re
from pathlib import Path

from sqlalchemy import create_engine, inspect

from orchestrator.addresses import redact_url, require_readable, sqlite_file, whole_address
from qkmodel.errors import InputError

# by which runs, logged models and registered dictionaries are found
TRAINING_TAG = "qk.training_id"
STUDY_TAG = "qk.study_id"
SHA256_TAG = "qk.dictionary_sha256"
# of a parent run with `SweepRecord.run_tag`, of a version with the sweep's name
SWEEP_TAG = "qk.sweep"
# beside the sweeps' folders
STORE_FILE = "mlflow.db"
LOCK_FILE = "mlflow.db.lock"
# a dead server then costs seconds instead of minutes; what the user set stays
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    # of PostgreSQL's client library
    "PGCONNECT_TIMEOUT": "10",
}
# of MLflow's client and of what it is made of: the server wants to know who asks; an answer is no answer of MLflow's
_WANTS_PASSWORD = re.compile(r"failed with error code 401|401 Client Error")
_NO_SERVER = re.compile(r"not in a valid JSON format|Failed to parse \w+ field")
# what MLflow's client tells of a request, and the same for people
_REQUEST_FAILURES = [
    (re.compile(r"too many (\d+) error responses"), r"it answers \1"),
    (re.compile(r"failed with error code (\d+)"), r"it answers \1"),
    (re.compile(r"Exceeded \d+ redirects"), "it sends from one address to another"),
    (re.compile(r"\[Errno -?\d+\] ([A-Za-z ]+)"), r"\1"),
    (re.compile(r"timed out"), "it takes too long to answer"),
    (re.compile(r"Connection reset by peer|Remote end closed connection"), "it closes connections"),
]


class TrackingUnavailable(Exception):
    """MLflow could not be reached or refused; the message is one line without passwords."""


def tracking_address(tracking: str | None, storage: Path) -> tuple[str, str | None]:
    """(MLflow's tracking address, artifact root): the root is None where a server decides.

    Without `tracking` it is an SQLite file in `storage`. Raises InputError for what is no address, one that cannot be
    read or of a kind that MLflow cannot keep runs at, and a storage in which no address can name a file.
    """
    artifact_root = (storage.absolute() / "mlflow-artifacts").as_uri()
    if tracking is None:
        return _address_in(storage.absolute()), artifact_root
    scheme = tracking.partition("://")[0] if isinstance(tracking, str) and "://" in tracking else ""
    if scheme in ("http", "https"):
        require_readable(tracking)
        return tracking, None
    if scheme.partition("+")[0] in ("sqlite", "postgresql", "mysql", "mssql"):
        require_readable(tracking)
        try:
            return whole_address(tracking), artifact_root
        except ValueError as error:
            raise InputError(f"tracking: {redact_url(tracking)} {error}") from error
    raise InputError(
        f"tracking: {redact_url(str(tracking))!r} is not an MLflow address; "
        "give http(s)://HOST:PORT of a server, sqlite:///PATH, or null for a file beside the sweeps"
    )


def _address_in(storage: Path) -> str:
    file = storage / STORE_FILE
    address = f"sqlite:///{file}"
    # escaped, MLflow finds the file and makes folders elsewhere
    if sqlite_file(address) != file:
        raise InputError(
            f"storage: {storage}: MLflow can keep no database in a folder with ? or % in its path; rename it, or give "
            "tracking the address of a server"
        )
    return address


def prepare_client() -> None:
    """Has MLflow's client, from now on, give up within seconds and say nothing by itself."""
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # what goes wrong is said in one line, by whoever asked; MLflow would add a traceback
    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def ask_database(address: str) -> None:
    """Raises SQLAlchemyError or ImportError where a database does not answer: MLflow itself retries for minutes."""
    # the other drivers' patience is in `_PATIENCE`, or they need none
    patience = {"connect_timeout": 10, "read_timeout": 10} if address.startswith("mysql") else {}
    engine = create_engine(address, connect_args=patience)
    inspect(engine).get_table_names()
    engine.dispose()


def unavailable(address: str, error: Exception) -> TrackingUnavailable:
    """What MLflow or a library below it raised, as one line that names the store."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # a download that failed is told in a list
    reason = f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") else lines[0]
    if _WANTS_PASSWORD.search(reason):
        names = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        if all(os.environ.get(name) for name in names.split(" and ")):
            return TrackingUnavailable(f"MLflow at {redact_url(address)} refuses the password in {names}")
        return TrackingUnavailable(f"MLflow at {redact_url(address)} asks for a password: set {names}")
    if _NO_SERVER.search(reason):
        return no_server(address)
    return TrackingUnavailable(f"MLflow at {redact_url(address)} cannot be used now: {_shortened(redact_url(reason))}")


def no_server(address: str) -> TrackingUnavailable:
    """For an address at which something answers that is not MLflow."""
    return TrackingUnavailable(f"MLflow at {redact_url(address)} cannot be used now: this is no MLflow server")


def _shortened(reason: str) -> str:
    if reason.startswith("API request to "):
        for pattern, words in _REQUEST_FAILURES:
            found = pattern.search(reason)
            if found is not None:
                return found.expand(words).strip().lower()
    return reason
