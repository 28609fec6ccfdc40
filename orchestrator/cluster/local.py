"""Jobs on this machine: a process in the background that outlives the terminal."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import psutil

from orchestrator.cluster.config import LocalCluster
from orchestrator.cluster.job import Job, JobStatus
from orchestrator.cluster.job_process import write_process
from orchestrator.cluster.log_file import follow_file
from orchestrator.config import SweepConfig
from qkmodel.errors import InputError

# a sweep ends within ten seconds of SIGTERM
END_SECONDS = 15.0


class LocalBackend:
    """See `Backend`."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster

    def check(self, config: SweepConfig) -> None:
        # takes torch, for which nobody who asks for a job should wait
        from orchestrator.plan import make_plan

        make_plan(config)

    def script(self, job: Job, config: SweepConfig) -> str:
        return " ".join(_command(job))

    def submit(self, job: Job) -> None:
        with job.log.open("ab") as log:
            process = subprocess.Popen(
                _command(job),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=job.record.working_directory,
                env=os.environ | self._cluster.environment,
                # its own session: the terminal's end is not its own
                start_new_session=True,
            )
        # by this one too: a job can be cancelled before it has come to write it
        write_process(job.folder, psutil.Process(process.pid))

    def status(self, job: Job) -> JobStatus:
        ended = job.ended()
        if ended is not None:
            return ended
        record = job.process()
        if record is None:
            return JobStatus(state="lost", detail="it never started; submit it again")
        if record.host != socket.gethostname():
            return JobStatus(state="unknown", detail=f"runs on {record.host}")
        if _process(job) is not None:
            return JobStatus(state="running", detail=f"process {record.pid}")
        # it may have ended since the file was looked for
        lost = JobStatus(state="lost", detail="killed; submit it again to go on")
        return job.ended() or job.unless_cancelled(lost)

    def logs(self, job: Job, follow: bool) -> Iterator[str]:
        return follow_file(job.log, follow, lambda: self.status(job).state != "running")

    def cancel(self, job: Job) -> None:
        record, process = job.process(), _process(job)
        if record is not None and record.host != socket.gethostname():
            raise InputError(f"{job.id}: runs on {record.host}; cancel it there")
        if process is None:
            raise InputError(f"{job.id}: does not run here; orchestrate jobs says where it is")
        # it may end by itself at any moment
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)
            _, alive = psutil.wait_procs([process], timeout=END_SECONDS)
            for one in [*process.children(recursive=True), process] if alive else []:
                # with one of them others go
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()


def _command(job: Job) -> list[str]:
    return [sys.executable, "-m", "orchestrator.cluster.job_process", str(job.folder)]


def _process(job: Job) -> psutil.Process | None:
    """The job's process, if it lives."""
    record = job.process()
    try:
        process = psutil.Process(record.pid) if record is not None else None
        is_it = process is not None and abs(process.create_time() - record.created) < 1
        return process if is_it and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None
