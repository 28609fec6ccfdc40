"""Fixtures of several test files."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator.ledger import Ledger
from orchestrator.ledger_pointer import LedgerPointer
from tests.orchestrator.tracking_world import IDENTITY, REFERENCE
from tests.system.services import PostgresServer, postgres_or_skip


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An empty MLflow database: its first migration takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").get_experiment_by_name("none")
    return (folder / "mlflow.db").read_bytes()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One that nobody stops."""
    with postgres_or_skip() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def sweep_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Of a sweep that is to have its ledger in the folder, or in PostgreSQL."""
    folder = tmp_path / "sweep"
    folder.mkdir()
    if request.param == "postgresql":
        server = request.getfixturevalue("postgres")
        identity = uuid.uuid4().hex
        LedgerPointer(server.ledgers, f"sweep_{identity}", identity).create(folder)
    return folder


@pytest.fixture
def storage(tmp_path: Path, migrated: bytes) -> Path:
    storage = tmp_path / "run s"
    storage.mkdir()
    (storage / "mlflow.db").write_bytes(migrated)
    return storage


@pytest.fixture
def ledger(storage: Path) -> Ledger:
    ledger = Ledger(storage / "l1" / "ledger.sqlite")
    ledger.open_sweep("l1", {"name": "l1", "layers": [8]}, "abc123", {"torch": "2.13.0"})
    ledger.open_study("study", "transcoder", 8, IDENTITY, model="m", corpus="c")
    ledger.set_reference("study", REFERENCE)
    return ledger
