"""A submitted sweep: what of it lies on disk, and the states it may be in.

runs/jobs/l1-3/
  job.json         what was asked for, of whom, and what the backend calls it; written before it is handed over
  sweep.yaml       the sweep file with presets and overrides resolved: later edits of the file do not reach the job
  log              what the sweep said, for backends that write files; ray.log: what Ray said, on SLURM's nodes
  process.json     where it runs now; exit.json: how it ended
  cancelled        there once somebody asked for its end; over.json: its last state, once that was seen
"""

import contextlib
import itertools
import json
import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError

from orchestrator.cluster.config import Cluster
from orchestrator.config import SweepConfig
from qkmodel.errors import InputError
from qkmodel.files import write_atomically
from qkmodel.schema import Schema

JOBS = Path("runs") / "jobs"
RECORD, SWEEP, LOG = "job.json", "sweep.yaml", "log"
PROCESS, EXIT, CANCELLED, OVER_FILE = "process.json", "exit.json", "cancelled", "over.json"

State = Literal["pending", "running", "finished", "failed", "interrupted", "cancelled", "lost", "unknown"]
ON_ITS_WAY: tuple[State, ...] = ("pending", "running")
OVER: tuple[State, ...] = ("finished", "failed", "interrupted", "cancelled", "lost")
Record = TypeVar("Record", bound=Schema)
INTERRUPTED_CODES = (130, 143)


class JobRecord(Schema):
    """`handle` is what the job is called on the cluster: made up beforehand, so that a job is never without."""

    format: Literal[1] = 1
    sweep: str
    cluster_name: str
    cluster: Cluster
    storage: str
    working_directory: str
    submitted: datetime
    handle: str


class ProcessRecord(Schema):
    """The process that runs a job's sweep; `created` in seconds since 1970, since numbers of processes come again."""

    host: str
    pid: int
    created: float


class ExitRecord(Schema):
    """The exit code of `orchestrate sweep`."""

    code: int


class JobStatus(Schema):
    """A state, and what else the backend says in a few words."""

    state: State
    detail: str = ""


@dataclass(frozen=True)
class Job:
    """One job's folder and what it records."""

    folder: Path
    record: JobRecord

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def sweep_file(self) -> Path:
        return self.folder / SWEEP

    @property
    def log(self) -> Path:
        return self.folder / LOG

    @property
    def is_cancelled(self) -> bool:
        return (self.folder / CANCELLED).exists()

    @contextlib.contextmanager
    def cancelling(self) -> Iterator[None]:
        """Marked first, so that whatever ends the job from now on is this; a block that fails takes its mark away."""
        mark, was_marked = self.folder / CANCELLED, self.is_cancelled
        mark.touch()
        try:
            yield
        except InputError:
            if not was_marked:
                mark.unlink()
            raise

    def over(self) -> JobStatus | None:
        """The state in which it was found to be over, which no cluster has to remember."""
        return _read(self.folder / OVER_FILE, JobStatus)

    def keep_over(self, status: JobStatus) -> None:
        """Kept for `over`."""
        write_atomically(self.folder / OVER_FILE, status.model_dump_json().encode())

    def unless_cancelled(self, status: JobStatus) -> JobStatus:
        """What a job that is over is, whoever ended it."""
        return JobStatus(state="cancelled") if self.is_cancelled else status

    def process(self) -> ProcessRecord | None:
        return _read(self.folder / PROCESS, ProcessRecord)

    def ended(self) -> JobStatus | None:
        """How its sweep ended; None where nothing was written of that."""
        exit_record = _read(self.folder / EXIT, ExitRecord)
        return None if exit_record is None else self.status_of_exit(exit_record.code)

    def status_of_exit(self, code: int) -> JobStatus:
        """What an exit code of `orchestrate sweep` means."""
        if code == 0:
            return JobStatus(state="finished")
        if self.is_cancelled:
            return JobStatus(state="cancelled")
        if code in INTERRUPTED_CODES:
            return JobStatus(state="interrupted", detail="submit it again to go on")
        return JobStatus(state="failed", detail=f"exit code {code}: orchestrate logs {self.id}")


def exit_code(returned: int) -> int:
    """As a shell has it: of a process that a signal ended, Popen says the signal's number below zero."""
    return returned if returned >= 0 else 128 - returned


def resolved_yaml(config: SweepConfig) -> str:
    """A sweep file that loads as `config`; what the person left out is left out."""
    # JSON is YAML in which text like 1e5 stays text
    return json.dumps(config.model_dump(mode="json", exclude_unset=True), indent=2, ensure_ascii=False) + "\n"


def new_handle(sweep: str) -> str:
    """A name that nothing else has on any cluster, and that each of them takes."""
    slug = re.sub(r"[^a-z0-9]+", "-", sweep.lower()).strip("-")[:25].strip("-")
    return f"qk-{slug}-{uuid.uuid4().hex[:8]}"


def new_job(config: SweepConfig, cluster_name: str, cluster: Cluster) -> Job:
    """A folder of its own below runs/jobs, for its owner only, named after the sweep and counted."""
    JOBS.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = JOBS.absolute() / f"{config.name}-{number}"
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            continue
        break
    record = JobRecord(
        sweep=config.name,
        cluster_name=cluster_name,
        cluster=cluster,
        storage=config.storage,
        working_directory=os.getcwd(),
        submitted=datetime.now().astimezone(),
        handle=new_handle(config.name),
    )
    # `tracking` may hold a password
    write_atomically(folder / SWEEP, resolved_yaml(config).encode())
    (folder / SWEEP).chmod(0o600)
    write_atomically(folder / RECORD, record.model_dump_json(indent=1).encode())
    return Job(folder, record)


def open_job(name: str) -> Job:
    """The job of a name below runs/jobs, or of a folder. Raises InputError."""
    folder = Path(name) if (Path(name) / RECORD).is_file() else JOBS / name
    try:
        record = JobRecord.model_validate_json((folder / RECORD).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{name}: no job of that name in {JOBS}; orchestrate jobs lists them") from None
    except (ValidationError, UnicodeDecodeError):
        raise InputError(f"{folder / RECORD}: is damaged; the sweep's own folder is not touched by that") from None
    return Job(folder.absolute(), record)


def all_jobs() -> tuple[list[Job], list[str]]:
    """Those in runs/jobs, oldest first, and what is wrong with others."""
    jobs, complaints = [], []
    for record in sorted(JOBS.glob(f"*/{RECORD}")):
        try:
            jobs.append(open_job(record.parent.name))
        except InputError as error:
            complaints.append(str(error))
    return sorted(jobs, key=lambda job: job.record.submitted), complaints


def _read(path: Path, schema: type[Record]) -> Record | None:
    try:
        return schema.model_validate_json(path.read_text())
    except (OSError, ValueError):
        # not there, or damaged, which is as good as not there
        return None
