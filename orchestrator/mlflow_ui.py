"""How to open the MLflow UI on a store that nobody serves yet."""

import socket
import sys


def is_free(port: int) -> bool:
    """Whether nobody answers on this port of the loopback address."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def ui_command(address: str, port: int) -> list[str]:
    """The command that serves a database store on this machine's loopback address.

    One worker and no job executor: the UI is for one person, and each further process costs seconds to start.
    """
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--backend-store-uri", address),
        *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
    ]
