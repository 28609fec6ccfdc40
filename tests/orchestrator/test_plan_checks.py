"""What is said of a RAY_ADDRESS before Ray itself is asked, which would wait for minutes."""

import http.server
import socket
import threading
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest

from orchestrator.plan_checks import check_cluster
from qkmodel.errors import InputError


@pytest.fixture
def dashboard() -> Iterator[int]:
    """The port of a server of web pages."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("other", ["dashboard", "silent"])
def test_another_server_than_a_ray_head_is_one_line(
    other: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.plan_checks.GREETING_SECONDS", 0.5)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{request.getfixturevalue(other)}")
    with pytest.raises(InputError, match=r"^RAY_ADDRESS: what answers at 127\.0\.0\.1:\d+ is no Ray head node"):
        check_cluster()


def test_a_server_that_speaks_as_ray_does_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    server.start()
    try:
        check_cluster()
    finally:
        server.stop(None)
