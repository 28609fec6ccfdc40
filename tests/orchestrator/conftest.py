"""Fixtures of several test files."""

import pytest
from mlflow import MlflowClient


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An empty MLflow database: its first migration takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").get_experiment_by_name("none")
    return (folder / "mlflow.db").read_bytes()
