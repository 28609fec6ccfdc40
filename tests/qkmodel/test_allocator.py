"""keep_freed_memory: what is freed serves what is allocated next."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEASURE = """
import resource, sys, threading
import torch
from qkmodel.allocator import keep_freed_memory

def allocate():
    # of the sizes in a forward pass, 29 MB together
    return [torch.full((600_000,), 1.0) for _ in range(12)]

def measure():
    for _ in range(10):
        allocate()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        allocate()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

if sys.argv[1] == "keep":
    keep_freed_memory()
# passes run on threads, whose memory glibc manages apart
thread = threading.Thread(target=measure)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's allocator")
def test_pages_are_taken_from_the_system_once() -> None:
    def faults(what: str) -> int:
        command = [sys.executable, "-c", MEASURE, what]
        return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)

    pages = 10 * 12 * 600_000 * 4 / 4096
    assert faults("default") > pages / 2
    assert faults("keep") < pages / 50
