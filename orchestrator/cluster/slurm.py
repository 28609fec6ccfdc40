"""Jobs of a SLURM cluster: one `sbatch` job that runs the sweep on its nodes and goes back into the queue by itself."""

import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import jinja2

from orchestrator.cluster.backend import NoAnswer
from orchestrator.cluster.config import SlurmCluster
from orchestrator.cluster.job import ON_ITS_WAY, Job, JobStatus, State
from orchestrator.cluster.log_file import follow_file
from orchestrator.config import SweepConfig
from orchestrator.storage_check import check_storage
from qkmodel.errors import InputError

# with what it takes to start, less than 15
ANSWER_SECONDS = 10.0
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


class SlurmBackend:
    """See `Backend`."""

    def __init__(self, cluster: SlurmCluster) -> None:
        self._cluster = cluster

    def check(self, config: SweepConfig) -> None:
        # before the plan, which asks a bucket with more patience
        check_storage(config.name, config.storage)
        partitions = _ask("sinfo", "--noheader", "--format=%R").split()
        wanted = self._cluster.partition
        if wanted is not None and wanted not in partitions:
            raise InputError(f"partition: {wanted} is none of this cluster's; it has {', '.join(partitions)}")
        # takes torch, for which nobody who asks for a job should wait
        from orchestrator.plan import make_plan

        # the nodes have the same environment and folders, but not the same CPUs and GPUs
        make_plan(config, here=False)

    def script(self, job: Job, config: SweepConfig) -> str:
        return self._script(job)

    def _script(self, job: Job) -> str:
        text = (resources.files("orchestrator.cluster") / "templates" / "slurm.sh.j2").read_text()
        template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(text)
        return template.render(
            cluster=self._cluster,
            name=job.record.handle,
            folder=str(job.folder),
            python=shlex.quote(sys.executable),
            python_folder=shlex.quote(str(Path(sys.executable).parent)),
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

    def submit(self, job: Job) -> None:
        # in a file's name % begins a pattern
        output = str(job.log).replace("%", "%%")
        where = (f"--chdir={job.record.working_directory}", f"--output={output}")
        answer = _ask("sbatch", "--parsable", *where, text=self._script(job))
        if not answer.strip().partition(";")[0].isdigit():
            raise InputError(
                f"sbatch: answered {answer.strip() or 'nothing'}, where a job's number was to be; see options"
            )

    def status(self, job: Job) -> JobStatus:
        listed = _ask("squeue", "--noheader", "--states=all", f"--name={job.record.handle}", "--format=%T|%r|%N|%A")
        # requeued under the same number; the last one is the latest
        name, reason, nodes, number = (listed.strip().splitlines() or ["|||"])[-1].split("|")
        if name in _STATES:
            state = _STATES[name]
            where = nodes if state == "running" else reason
            return JobStatus(state=state, detail=f"SLURM job {number}, {where}".rstrip(", "))
        ended = job.ended()
        if ended is not None:
            return ended
        if name == "CANCELLED":
            return JobStatus(state="cancelled")
        if name == "FAILED" and job.process() is None:
            # a line of setup, the interpreter: once more would be the same
            failed = JobStatus(state="failed", detail=f"before the sweep began: orchestrate logs {job.id}")
            # cancelled during its setup, the script had no ear for it yet
            return job.unless_cancelled(failed)
        why = f"SLURM says {name.lower()}" if name else "SLURM no longer knows it"
        return job.unless_cancelled(JobStatus(state="lost", detail=f"{why}; submit it again to go on"))

    def logs(self, job: Job, follow: bool) -> Iterator[str]:
        return follow_file(job.log, follow, lambda: self.status(job).state not in ON_ITS_WAY)

    def cancel(self, job: Job) -> None:
        name = f"--name={job.record.handle}"
        for state in ("PENDING", "SUSPENDED"):
            _ask("scancel", f"--state={state}", name)
        # to the script, which tells the sweep; on several nodes Ray would end under it otherwise
        _ask("scancel", "--batch", "--signal=TERM", name)


def _ask(*command: str, text: str | None = None) -> str:
    """What a command of SLURM answers. Raises InputError."""
    try:
        ran = subprocess.run(command, input=text, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except FileNotFoundError:
        raise InputError(f"{command[0]}: is not installed here; submit from a machine of the SLURM cluster") from None
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{command[0]}: SLURM did not answer within {ANSWER_SECONDS:.0f} s") from None
    if ran.returncode != 0:
        complaint = " ".join(ran.stderr.split()) or f"exit code {ran.returncode}"
        raise InputError(f"{command[0]}: {complaint}")
    return ran.stdout
