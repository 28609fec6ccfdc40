"""Serving pages about a sweep on this machine's loopback address until somebody ends it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from orchestrator.process_end import end_with_parent
from qkmodel.errors import InputError

CHECK_SECONDS = 0.5


def require_free(port: int) -> None:
    """Raises InputError when somebody answers on this port of the loopback address."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise InputError(f"--port: {port} is in use on this machine; give another")


def serve(commands: Sequence[Sequence[str]], environment: Mapping[str, str]) -> bool:
    """Runs all commands until this process is asked to end, or one of them ends by itself: then the answer is False.

    `environment` goes to each beside this process's own.
    """
    # one worker per server is enough for one person
    own = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            processes.append(subprocess.Popen(command, env=own | environment, preexec_fn=end_with_parent()))
        while all(process.poll() is None for process in processes):
            time.sleep(CHECK_SECONDS)
        return False
    except KeyboardInterrupt:
        return True
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def mlflow_environment(address: str) -> dict[str, str]:
    """What tells `mlflow_command` of the database it is to serve: every user of the machine can read command lines."""
    return {"MLFLOW_BACKEND_STORE_URI": address}


def mlflow_command(port: int) -> list[str]:
    """The command that serves a database store on this machine's loopback address.

    One worker and no job executor: the UI is for one person, and each further process costs seconds to start.
    """
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
    ]
