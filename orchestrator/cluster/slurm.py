"""Jobs of a SLURM cluster: one `sbatch` job that runs the sweep on its nodes and goes back into the queue by itself."""

import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources

import jinja2

from orchestrator.cluster.config import SlurmCluster
from orchestrator.cluster.job import Job, JobStatus, State
from orchestrator.cluster.log_file import follow_file
from orchestrator.config import SweepConfig
from qkmodel.errors import InputError

ANSWER_SECONDS = 12.0
# what SLURM calls a job's states (man squeue)
_STATES: dict[str, State] = {
    "PENDING": "pending",
    "CONFIGURING": "pending",
    "REQUEUED": "pending",
    "REQUEUE_HOLD": "pending",
    "SPECIAL_EXIT": "pending",
    "SUSPENDED": "pending",
    "STOPPED": "pending",
    "RUNNING": "running",
    "COMPLETING": "running",
    "SIGNALING": "running",
    "STAGE_OUT": "running",
    "RESIZING": "running",
}
_UNKNOWN_JOB = "Invalid job id"


class SlurmBackend:
    """See `Backend`."""

    def __init__(self, cluster: SlurmCluster) -> None:
        self._cluster = cluster

    def check(self, config: SweepConfig) -> None:
        partitions = _ask("sinfo", "--noheader", "--format=%R").split()
        wanted = self._cluster.partition
        if wanted is not None and wanted not in partitions:
            raise InputError(f"partition: {wanted} is none of this cluster's; it has {', '.join(partitions)}")

    def script(self, job: Job, config: SweepConfig) -> str:
        return self._script(job)

    def _script(self, job: Job) -> str:
        text = (resources.files("orchestrator.cluster") / "templates" / "slurm.sh.j2").read_text()
        template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(text)
        return template.render(
            cluster=self._cluster,
            sweep=job.record.sweep,
            folder=str(job.folder),
            python=shlex.quote(sys.executable),
            options=self._options(),
            quote=shlex.quote,
        )

    def _options(self) -> list[str]:
        cluster = self._cluster
        wanted = {
            "partition": cluster.partition,
            "account": cluster.account,
            "time": cluster.time,
            "mem": cluster.memory_per_node,
            "gpus-per-node": cluster.gpus_per_node or None,
        }
        return [*(f"--{name}={value}" for name, value in wanted.items() if value is not None), *cluster.options]

    def submit(self, job: Job) -> str:
        # in a file's name % begins a pattern
        output = str(job.log).replace("%", "%%")
        where = (f"--chdir={job.record.working_directory}", f"--output={output}")
        answer = _ask("sbatch", "--parsable", *where, text=self._script(job))
        # with several clusters under one controller it is ID;CLUSTER
        return answer.strip().partition(";")[0]

    def status(self, job: Job) -> JobStatus:
        listed = _ask("squeue", "--noheader", f"--jobs={job.record.handle}", "--format=%T|%r|%N", gone=_UNKNOWN_JOB)
        name, _, rest = listed.strip().partition("|")
        reason, _, nodes = rest.partition("|")
        if name in _STATES:
            state = _STATES[name]
            where = nodes if state == "running" else reason
            return JobStatus(state, f"SLURM job {job.record.handle}, {where}".rstrip(", "))
        ended = job.ended()
        if ended is not None:
            return ended
        if job.is_cancelled or name == "CANCELLED":
            return JobStatus("cancelled")
        why = f"SLURM says {name.lower()}" if name else "SLURM no longer knows it"
        return JobStatus("lost", f"{why}; submit it again to go on")

    def logs(self, job: Job, follow: bool) -> Iterator[str]:
        return follow_file(job.log, follow, lambda: self.status(job).state not in ("pending", "running"))

    def cancel(self, job: Job) -> None:
        _ask("scancel", str(job.record.handle), gone=_UNKNOWN_JOB)


def _ask(*command: str, text: str | None = None, gone: str | None = None) -> str:
    """What a command of SLURM answers; empty where it complains with the words `gone`. Raises InputError."""
    try:
        ran = subprocess.run(command, input=text, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except FileNotFoundError:
        raise InputError(f"{command[0]}: is not installed here; submit from a machine of the SLURM cluster") from None
    except subprocess.TimeoutExpired:
        raise InputError(f"{command[0]}: SLURM did not answer within {ANSWER_SECONDS:.0f} s") from None
    if ran.returncode != 0:
        complaint = " ".join(ran.stderr.split()) or f"exit code {ran.returncode}"
        if gone is not None and gone in complaint:
            return ""
        raise InputError(f"{command[0]}: {complaint}")
    return ran.stdout
