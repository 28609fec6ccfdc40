"""Fixtures of several test files."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator.ledger import Ledger
from tests.orchestrator.tracking_world import IDENTITY, REFERENCE


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An empty MLflow database: its first migration takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").get_experiment_by_name("none")
    return (folder / "mlflow.db").read_bytes()


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
