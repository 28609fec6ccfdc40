"""What a sweep does about an MLflow that is not there, is slow, or answers nonsense."""

import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.ledger import Ledger
from orchestrator.tracking import Tracker
from orchestrator.tracking_notes import Owed, owed
from orchestrator.tracking_store import TrackingUnavailable
from orchestrator.tracking_thread import TrackingThread
from tests.orchestrator.tracking_world import start

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
        (b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n", "it answers 500"),
        (b"", "it closes connections"),
        (None, "it takes too long to answer"),
    ],
    ids=["500", "closes", "silent"],
)
def test_a_failing_server_is_said_in_a_few_words(
    storage: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, answer: bytes | None, reason: str
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with failing_server(answer) as address, pytest.raises(TrackingUnavailable) as caught:
        Tracker(address, storage, ledger).deliver()
    assert str(caught.value) == f"MLflow at {address} cannot be used now: {reason}"


@contextmanager
def failing_server(answer: bytes | None) -> Iterator[str]:
    """The address of a server that gives one answer to everything, nothing at all with None."""

    class Failing(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            if answer is None:
                ended.wait()
            else:
                self.request.sendall(answer)

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
    assert thread.stop("FINISHED") is None


def test_a_server_that_never_answers_does_not_hold_up_an_interrupted_sweep(tmp_path: Path, ledger: Ledger) -> None:
    start(ledger, "one")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        thread = TrackingThread(Tracker(address, tmp_path, ledger), interval=0.05)
        began = time.monotonic()
        thread.stop("KILLED", patience=0.5)
        assert time.monotonic() - began < 3
    assert owed(ledger) == Owed(1, 0)
