"""An MLflow server that is away for a whole sweep gets everything later, as one that was there all the time."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from orchestrator.status import status_record
from tests.system.services import MlflowServer
from tests.system.test_kills import Sweep

pytestmark = pytest.mark.system

TOKENS = 8192
SEARCH = {
    "sampler": "grid",
    "trainings": 2,
    "space": {"dictionary_size": [128, 256], "activation": "topk", "k": 8, "learning_rate": 6e-3},
}
# what differs between two sweeps that did the same
OWN = ("mlflow.parentRunId", "mlflow.log-model.history", "qk.sweep", "mlflow.runName")


def contents(url: str) -> list[dict[str, Any]]:
    """Every run with its params, tags, whole metric histories and artifacts, without what is one sweep's own."""
    client = MlflowClient(url)
    runs = client.search_runs([client.get_experiment_by_name("kills").experiment_id])
    return sorted((_content(client, run.info.run_id) for run in runs), key=lambda run: str(run["params"]))


def _content(client: MlflowClient, run_id: str) -> dict[str, Any]:
    run = client.get_run(run_id)
    return {
        "status": run.info.status,
        "params": run.data.params,
        "tags": {name: value for name, value in run.data.tags.items() if name not in OWN},
        "metrics": {
            name: [(point.step, point.value) for point in client.get_metric_history(run_id, name)]
            for name in sorted(run.data.metrics)
        },
        "artifacts": sorted(_artifacts(client, run_id, "")),
    }


def _artifacts(client: MlflowClient, run_id: str, folder: str) -> list[str]:
    found = client.list_artifacts(run_id, folder)
    return [path for one in found for path in (_artifacts(client, run_id, one.path) if one.is_dir else [one.path])]


@pytest.mark.slow
def test_a_server_that_is_away_all_the_time_gets_the_same_later(tmp_path: Path) -> None:
    expected = MlflowServer(tmp_path)
    try:
        Sweep.create(tmp_path / "there", TOKENS, tracking=expected.url, search=SEARCH).run()
        there = contents(expected.url)
    finally:
        expected.kill()
    (tmp_path / "away").mkdir()
    server = MlflowServer(tmp_path / "away")
    server.kill()
    sweep = Sweep.create(tmp_path / "sweep", TOKENS, tracking=server.url, search=SEARCH)
    sweep.run()
    assert "MLflow does not have everything yet" in sweep.said
    assert status_record(sweep.ledger())["owed"]["trainings"] == 2
    server.start()
    try:
        command = [sys.executable, "-m", "orchestrator", "track", str(sweep.file)]
        track = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert (track.returncode, track.stdout) == (0, ""), track.stderr
        assert track.stderr == f"MLflow at {server.url} has everything\n"
        assert status_record(sweep.ledger())["owed"] == {"trainings": 0, "reports": 0, "anything": False}
        assert contents(server.url) == there
    finally:
        server.kill()
