"""A submitted sweep: what of it lies on disk, and the states it may be in.

runs/jobs/l1-3/
  job.json         what was asked for, of whom, and what the backend calls it; written before it is handed over
  sweep.yaml       the sweep file with presets and overrides resolved: later edits of the file do not reach the job
  log              what the sweep said, for backends that write files
  process.json     where it runs now; exit.json: how it ended
  cancelled        there once somebody asked for its end
"""

import itertools
import json
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import yaml
from pydantic import ValidationError

from orchestrator.cluster.config import Cluster
from orchestrator.config import SweepConfig
from qkmodel.errors import InputError
from qkmodel.files import write_atomically
from qkmodel.schema import Schema

JOBS = Path("runs") / "jobs"
RECORD, SWEEP, LOG = "job.json", "sweep.yaml", "log"
PROCESS, EXIT, CANCELLED = "process.json", "exit.json", "cancelled"

State = Literal["pending", "running", "finished", "failed", "interrupted", "cancelled", "lost", "unknown"]
OVER: tuple[State, ...] = ("finished", "failed", "interrupted", "cancelled", "lost")
INTERRUPTED_CODES = (130, 143)


class JobRecord(Schema):
    """`handle` is the backend's own name for the job, None while it is being handed over."""

    format: Literal[1] = 1
    sweep: str
    cluster_name: str
    cluster: Cluster
    storage: str
    working_directory: str
    submitted: datetime
    handle: str | None = None


class ProcessRecord(Schema):
    """The process that runs a job's sweep; `created` in seconds since 1970, since numbers of processes come again."""

    host: str
    pid: int
    created: float


class ExitRecord(Schema):
    """The exit code of `orchestrate sweep`."""

    code: int


@dataclass(frozen=True)
class JobStatus:
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

    def mark_cancelled(self) -> None:
        """Said first, so that whatever ends the job from now on is this."""
        (self.folder / CANCELLED).touch()

    def with_handle(self, handle: str) -> "Job":
        """The same job once the backend has taken it."""
        record = self.record.model_copy(update={"handle": handle})
        write_atomically(self.folder / RECORD, record.model_dump_json(indent=1).encode())
        return Job(self.folder, record)

    def process(self) -> ProcessRecord | None:
        return _read(self.folder / PROCESS, ProcessRecord)

    def ended(self) -> JobStatus | None:
        """How its sweep ended; None where nothing was written of that."""
        exit_record = _read(self.folder / EXIT, ExitRecord)
        return None if exit_record is None else self.status_of_exit(exit_record.code)

    def status_of_exit(self, code: int) -> JobStatus:
        """What an exit code of `orchestrate sweep` means."""
        if code == 0:
            return JobStatus("finished")
        if self.is_cancelled:
            return JobStatus("cancelled")
        if code in INTERRUPTED_CODES:
            return JobStatus("interrupted", "submit it again to go on")
        return JobStatus("failed", f"exit code {code}: orchestrate logs {self.id}")


def resolved_yaml(config: SweepConfig) -> str:
    """A sweep file that loads as `config`; what the person left out is left out."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)


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


def _read(path: Path, schema: type[Schema]):
    try:
        return schema.model_validate(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
