"""The stores that MLflow keeps runs in: PostgreSQL directly and behind a server, a server that asks for a password."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from orchestrator.ledger import Ledger
from orchestrator.tracking import Tracker
from orchestrator.tracking_notes import Owed, owed
from orchestrator.tracking_store import TrackingUnavailable
from tests.orchestrator.sweep_files import write_sweep
from tests.orchestrator.tracking_world import IDENTITY, REFERENCE, finish, start
from tests.system.services import MlflowServer, PostgresServer, mlflow_ui, postgres_or_skip

pytestmark = pytest.mark.system

PASSWORD = "a-long-enough-password"


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with postgres_or_skip() as server:
        yield server


@pytest.fixture
def ledger(tmp_path: Path, request: pytest.FixtureRequest) -> Ledger:
    """Of a sweep that has the test's name: stores are shared."""
    ledger = Ledger(tmp_path / "runs" / "l1" / "ledger.sqlite")
    ledger.open_sweep(request.node.name, {}, None, {})
    ledger.open_study("study", "transcoder", 8, IDENTITY, model="m", corpus="c")
    ledger.set_reference("study", REFERENCE)
    return ledger


def deliver_in_two_parts(address: str, ledger: Ledger) -> None:
    start(ledger, "one")
    ledger.report("one", 100, {"loss": 1.0}, seconds=1.0)
    Tracker(address, ledger.folder.parent, ledger).deliver()
    ledger.report("one", 200, {"loss": 0.5}, seconds=2.0)
    finish(ledger, "one", l0=16.0, kl=0.1)
    # as after a kill: another process, which knows nothing
    again = Tracker(address, ledger.folder.parent, ledger)
    again.deliver("FINISHED")
    again.deliver("FINISHED")


def assert_complete(client: MlflowClient, ledger: Ledger) -> None:
    found = client.search_runs([client.get_experiment_by_name(ledger.sweep().name).experiment_id])
    (parent,) = [run for run in found if "qk.sweep" in run.data.tags]
    (child,) = [run for run in found if run.data.tags.get("qk.training_id") == "one"]
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    points = client.get_metric_history(child.info.run_id, "loss")
    assert [(point.step, point.value) for point in points] == [(100, 1.0), (200, 0.5)]
    assert [point.value for point in client.get_metric_history(child.info.run_id, "kl")] == [0.1]
    assert child.data.tags["pareto"] == "true"


def test_postgresql_directly(postgres: PostgresServer, ledger: Ledger) -> None:
    deliver_in_two_parts(postgres.url, ledger)
    assert_complete(MlflowClient(postgres.url), ledger)


def test_postgresql_behind_a_server(postgres: PostgresServer, ledger: Ledger, tmp_path: Path) -> None:
    with MlflowServer(tmp_path, store=postgres.url) as server:
        deliver_in_two_parts(server.url, ledger)
        assert_complete(MlflowClient(server.url), ledger)


def test_the_ui_shows_no_password_in_a_command_line(postgres: PostgresServer, ledger: Ledger, tmp_path: Path) -> None:
    # it lets everybody in, whatever the password
    address = postgres.url.replace("@", ":hunter2@")
    deliver_in_two_parts(address, ledger)
    write_sweep(tmp_path, tracking=address)
    with mlflow_ui("sweep.yaml", tmp_path) as ui:
        assert_complete(MlflowClient(ui), ledger)
        words = [word for process in psutil.process_iter(["cmdline"]) for word in process.info["cmdline"] or ()]
        assert ui.rpartition(":")[2] in words
        assert [word for word in words if "hunter2" in word] == []


def test_a_server_that_asks_for_a_password(ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = MlflowServer(
        tmp_path,
        options=("--app-name", "basic-auth"),
        environment={
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "for this test alone",
            "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
            "MLFLOW_AUTH_CONFIG_PATH": str(auth_settings(tmp_path)),
        },
    )
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "not the password")
        start(ledger, "waiting", k=4)
        with pytest.raises(TrackingUnavailable) as refused:
            Tracker(server.url, tmp_path, ledger).deliver()
        assert f"MLflow at {server.url} refuses the password in MLFLOW_TRACKING_USERNAME and" in str(refused.value)
        assert "not the password" not in str(refused.value)
        assert owed(ledger) == Owed(1, 0, anything=True)
        ledger.fail("waiting", "not of interest")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        deliver_in_two_parts(server.url, ledger)
        assert_complete(MlflowClient(server.url), ledger)
        assert owed(ledger) == Owed(0, 0, anything=False)
    finally:
        server.kill()


def auth_settings(folder: Path) -> Path:
    """MLflow's settings for passwords, with the users' database in `folder`."""
    path = folder / "auth.ini"
    path.write_text(
        "[mlflow]\ndefault_permission = READ\n"
        f"database_uri = sqlite:///{folder}/users.db\nadmin_username = admin\nadmin_password = {PASSWORD}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    return path
