"""Runs tests of Triton kernels: on the GPU if there is one, else in Triton's interpreter.

Triton decides at its first import whether to interpret, and other tests import it too: hence a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch


def run_cases(name: str) -> None:
    """All tests of a file beside this one; fails with what they print."""
    cases = Path(__file__).with_name(name)
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", str(cases)],
        cwd=cases.parents[2],
        env=os.environ | interpret,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
