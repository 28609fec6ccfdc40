"""Servers of pages end with the process that serves them."""

import contextlib
import subprocess
import sys
import time

import psutil
import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such tie")
def test_a_server_ends_with_a_killed_parent() -> None:
    child = "import time; print('up', flush=True); time.sleep(600)"
    script = f"import sys; from orchestrator.web_pages import serve; serve([[sys.executable, '-c', {child!r}]], {{}})"
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "up\n"
    (server,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    with contextlib.suppress(psutil.NoSuchProcess):
        while server.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.05)
