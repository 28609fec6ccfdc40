"""Signals: the first has packs write checkpoints, one that comes with it is the same, a later one ends at once."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from orchestrator.stopping import Stopping

stopping = Stopping(SimpleNamespace(stopping=False), Path(sys.argv[1]), 1)
with stopping.on_signals():
    for number, pause in zip(sys.argv[2::2], sys.argv[3::2]):
        os.kill(os.getpid(), int(number))
        time.sleep(float(pause))
    print("still there", stopping.signal, flush=True)
    os._exit(0)
"""


@pytest.mark.parametrize(
    ("signals", "code", "said"),
    [
        ([(signal.SIGTERM, 0)], 0, "still there 15"),
        ([(signal.SIGTERM, 0.1), (signal.SIGTERM, 0)], 0, "still there 15"),
        ([(signal.SIGINT, 0.1), (signal.SIGTERM, 0)], 0, "still there 2"),
        ([(signal.SIGTERM, 1.2), (signal.SIGTERM, 0)], 143, "ended at once"),
        ([(signal.SIGTERM, 1.2), (signal.SIGINT, 0)], 130, "ended at once"),
    ],
)
def test_what_a_signal_does(tmp_path: Path, signals: list[tuple[int, float]], code: int, said: str) -> None:
    words = [str(word) for number, pause in signals for word in (int(number), pause)]
    ran = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path), *words], capture_output=True, text=True)
    assert ran.returncode == code and said in ran.stdout + ran.stderr


def test_a_signal_after_all_is_said_changes_nothing() -> None:
    script = """
import atexit, os, signal, sys
from orchestrator.__main__ import main
for number in (signal.SIGINT, signal.SIGTERM):
    atexit.register(os.kill, os.getpid(), number)
sys.argv = ["orchestrate", "sweep", "--help"]
main()
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "") and "Usage" in ran.stdout
