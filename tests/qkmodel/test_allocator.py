"""What is freed serves what is allocated next, until it is given back."""

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


GIVE_BACK = """
import resource, threading
import torch
from qkmodel.allocator import give_back_memory, keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

keep_freed_memory()
thread = threading.Thread(target=lambda: [torch.full((5_000_000,), 1.0) for _ in range(20)])
thread.start()
thread.join()
kept = resident()
give_back_memory()
print(kept - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's allocator")
def test_what_a_thread_kept_is_given_back() -> None:
    command = [sys.executable, "-c", GIVE_BACK]
    returned = int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert returned > 0.9 * 20 * 5_000_000 * 4
