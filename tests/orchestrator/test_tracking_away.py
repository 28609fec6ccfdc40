"""What a sweep does about an MLflow that is not there, is slow, or answers nonsense."""

import http.client
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

import pytest
import requests
from mlflow import MlflowClient
from mlflow.entities import ViewType

from orchestrator import load_dictionary
from orchestrator.choice import apply_rule, parse_rule
from orchestrator.ledger import Ledger
from orchestrator.registry import register
from orchestrator.status import study_statuses
from orchestrator.tracking import Tracker
from orchestrator.tracking_notes import Owed, owed
from orchestrator.tracking_store import TrackingUnavailable
from orchestrator.tracking_thread import TrackingThread
from tests.orchestrator.dictionaries import make_sweep
from tests.orchestrator.tracking_world import client_of, finish, start
from tests.system.services import MlflowServer

DEAD_ADDRESS = "http://user:hunter2@127.0.0.1:9"


def test_a_dead_server_is_said_quickly_in_one_line_without_the_password(storage: Path, ledger: Ledger) -> None:
    began = time.monotonic()
    with pytest.raises(TrackingUnavailable) as caught:
        Tracker(DEAD_ADDRESS, storage, ledger).deliver()
    assert time.monotonic() - began < 20
    assert str(caught.value) == "MLflow at http://user:***@127.0.0.1:9 cannot be used now: connection refused"
    assert ledger.delivered() == {}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", "it answers 500"),
        (b"", "it closes connections"),
        (None, "it takes too long to answer"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", "it answers 404"),
        (
            b"HTTP/1.1 302 Found\r\nLocation: /again\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            "it sends from one address to another",
        ),
    ],
    ids=["500", "closes", "silent", "404", "redirects"],
)
def test_a_failing_server_is_said_in_a_few_words(
    storage: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, answer: bytes | None, reason: str
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with failing_server(answer) as address, pytest.raises(TrackingUnavailable) as caught:
        Tracker(address, storage, ledger).deliver()
    assert str(caught.value) == f"MLflow at {address} cannot be used now: {reason}"


@pytest.mark.parametrize(
    "body",
    ["", "{}", "[]", "<html>", '{"experiment": 5}', '{"experiment": {"experiment_id": "1"}}', '{"model_version": 5}'],
)
def test_what_is_no_mlflow_server_is_said_and_nothing_is_forgotten(
    storage: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    monkeypatch.chdir(storage.parent)
    chosen = make_sweep(storage)
    Tracker(None, storage, ledger).deliver("FINISHED")
    before = ledger.delivered()
    answer = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()
    with failing_server(answer) as address:
        for attempt in (
            lambda: Tracker(address, storage, ledger).deliver("FINISHED"),
            lambda: register(address, storage, chosen, apply_rule(study_statuses(chosen), parse_rule("knee"))),
            lambda: load_dictionary("models:/qk.smollm2-135m.L08@knee", address),
        ):
            with pytest.raises(TrackingUnavailable) as caught:
                attempt()
            assert str(caught.value) == f"MLflow at {address} cannot be used now: this is no MLflow server"
    assert ledger.delivered() == before
    assert owed(ledger) == Owed(0, 0, anything=False)


def test_a_server_that_asks_for_a_password_is_said_with_what_to_set(
    storage: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic\r\n"
    answer = head + b"Content-Length: 4\r\nConnection: close\r\n\r\nwho?"
    variables = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    with failing_server(answer) as address:
        for said in ("asks for a password: set", "refuses the password in"):
            with pytest.raises(TrackingUnavailable) as caught:
                Tracker(address, storage, ledger).deliver()
            assert str(caught.value) == f"MLflow at {address} {said} {variables}"
            for name in variables.split(" and "):
                monkeypatch.setenv(name, "wrong")


@contextmanager
def failing_server(answer: bytes | None) -> Iterator[str]:
    """The address of a server that gives one answer to everything, nothing at all with None."""

    class Failing(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            # all of it: closing on what is unread resets the connection, and the answer is lost with it
            headers = http.client.parse_headers(self.rfile) if self.rfile.readline() else {}
            self.rfile.read(int(headers.get("Content-Length", 0)))
            if answer is None:
                ended.wait()
            else:
                self.wfile.write(answer)

    ended = threading.Event()
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        ended.set()
        server.shutdown()


def test_a_dead_database_is_said_quickly(storage: Path, ledger: Ledger) -> None:
    (storage / "broken.db").write_text("no database at all, though it is long enough to look at " * 4)
    for database in ("nowhere/mlflow.db", "broken.db"):
        began = time.monotonic()
        with pytest.raises(TrackingUnavailable, match=database):
            Tracker(f"sqlite:///{storage}/{database}", storage, ledger).deliver()
        assert time.monotonic() - began < 5


def test_the_thread_survives_an_absent_server_and_tells_the_error(storage: Path, ledger: Ledger) -> None:
    thread = TrackingThread(Tracker(f"sqlite:///{storage}/nowhere/mlflow.db", storage, ledger), interval=0.05)
    deadline = time.monotonic() + 30
    while thread.error is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (storage / "nowhere").mkdir()
    (storage / "nowhere" / "mlflow.db").write_bytes((storage / "mlflow.db").read_bytes())
    assert thread.stop("FINISHED", patience=60) is None


def test_a_server_that_never_answers_does_not_hold_up_an_interrupted_sweep(tmp_path: Path, ledger: Ledger) -> None:
    start(ledger, "one")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        thread = TrackingThread(Tracker(address, tmp_path, ledger), interval=0.05)
        began = time.monotonic()
        assert thread.stop("KILLED", patience=0.5) == f"MLflow at {address} takes more than 0.5 s to get the rest"
        assert time.monotonic() - began < 3
    assert owed(ledger) == Owed(1, 0, anything=True)


@pytest.mark.parametrize(("kind", "driver"), [("postgresql+psycopg2", "psycopg2"), ("mysql+pymysql", "pymysql")])
def test_a_database_that_never_answers_is_given_up(
    storage: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, kind: str, driver: str
) -> None:
    pytest.importorskip(driver)
    monkeypatch.delenv("PGCONNECT_TIMEOUT", raising=False)
    start(ledger, "one")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"{kind}://me:hunter2@127.0.0.1:{silent.getsockname()[1]}/mlflow"
        thread = TrackingThread(Tracker(address, storage, ledger), interval=0.05)
        said = thread.stop("FINISHED", patience=60)
    assert said is not None and "MLflow at " in said and "hunter2" not in said and "takes more than" not in said


@pytest.mark.system
def test_runs_that_a_slow_server_makes_twice_are_one_in_the_end(
    tmp_path: Path, migrated: bytes, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    (tmp_path / "server.db").write_bytes(migrated)
    start(ledger, "one")
    ledger.report("one", 500, {"loss": 0.9}, seconds=1.0)
    with MlflowServer(tmp_path) as server, SlowProxy(server.url, slow=4) as proxy:
        tracker = Tracker(proxy.url, tmp_path, ledger)
        # each of three tries makes a parent run, and none is answered in time
        with pytest.raises(TrackingUnavailable, match="takes too long to answer"):
            tracker.deliver()
        # a training's run is made twice here
        tracker.deliver()
        client = MlflowClient(server.url)
        experiment = client.get_experiment_by_name("l1").experiment_id
        assert proxy.slow == 0
        assert len(client.search_runs([experiment])) == 3
        tracker.deliver("FINISHED")
        parent, child = sorted(client.search_runs([experiment]), key=lambda run: "qk.training_id" in run.data.tags)
        assert (parent.info.status, child.data.tags["mlflow.parentRunId"]) == ("FINISHED", parent.info.run_id)
        assert child.data.metrics == {"loss": 0.9}
        assert len(client.search_runs([experiment], run_view_type=ViewType.DELETED_ONLY)) == 3
        assert ledger.delivered().keys() == {parent.info.run_id, child.info.run_id}
        # and where there is but one delivery, the first and last
        other = Ledger(tmp_path / "other" / "ledger.sqlite")
        other.open_sweep("other", {}, None, {})
        proxy.slow = 1
        Tracker(proxy.url, tmp_path, other).deliver("FINISHED")
        (parent,) = client.search_runs([client.get_experiment_by_name("other").experiment_id])
        assert proxy.slow == 0 and parent.info.status == "FINISHED"


class SlowProxy:
    """Stands before an MLflow server and keeps back its answers to the next `slow` requests that create a run."""

    def __init__(self, server: str, slow: int) -> None:
        self.slow = slow

        class Forwarding(BaseHTTPRequestHandler):
            def _forward(handler) -> None:
                body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
                kept = {name: value for name, value in handler.headers.items() if name != "Host"}
                answer = requests.request(handler.command, server + handler.path, data=body, headers=kept)
                if handler.path.endswith("/runs/create") and self.slow > 0:
                    self.slow -= 1
                    time.sleep(4)
                with suppress(OSError):
                    handler.send_response(answer.status_code)
                    handler.send_header("Content-Length", str(len(answer.content)))
                    handler.end_headers()
                    handler.wfile.write(answer.content)

            do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _forward

            def log_message(self, *arguments: object) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Forwarding)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_an_object_store_that_lets_nobody_in_is_said_in_one_line(
    storage: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(storage / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    client_of(storage).create_experiment("l1", artifact_location="s3://bucket/artifacts")
    start(ledger, "one")
    finish(ledger, "one", l0=8, kl=0.2)
    with pytest.raises(TrackingUnavailable, match="credentials"):
        Tracker(None, storage, ledger).deliver()
