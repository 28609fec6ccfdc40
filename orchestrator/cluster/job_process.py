"""The process that runs a job's sweep and writes down where it is and how it ended.

    python -m orchestrator.cluster.job_process FOLDER

SIGTERM and SIGINT go on to the sweep, which writes checkpoints and ends within ten seconds.
"""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil

from orchestrator.cluster.job import EXIT, PROCESS, SWEEP, ExitRecord, ProcessRecord, exit_code
from orchestrator.process_end import end_with_parent
from qkmodel.files import write_atomically


def write_process(folder: Path, process: psutil.Process) -> None:
    """Writes down where a job runs."""
    record = ProcessRecord(host=socket.gethostname(), pid=process.pid, created=process.create_time())
    write_atomically(folder / PROCESS, record.model_dump_json().encode())


def main(folder: Path) -> int:
    """Runs to the sweep's end; its exit code."""
    (folder / EXIT).unlink(missing_ok=True)
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: asked.append(received))
    # who reads of it may send a signal
    write_process(folder, psutil.Process())
    command = [sys.executable, "-m", "orchestrator", "sweep", str(folder / SWEEP)]
    # killed alone, it would leave a sweep that nobody can cancel
    sweep = subprocess.Popen(command, preexec_fn=end_with_parent())
    code = None
    while code is None:
        while asked:
            sweep.send_signal(asked.pop(0))
        try:
            code = sweep.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
    code = exit_code(code)
    write_atomically(folder / EXIT, ExitRecord(code=code).model_dump_json().encode())
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
