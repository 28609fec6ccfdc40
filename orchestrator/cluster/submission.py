"""Submitting a sweep, listing what was submitted, ending it."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

from pydantic import ValidationError
from rich import box
from rich.table import Table

from orchestrator.addresses import redact_url
from orchestrator.cluster.backend import Backend, NoAnswer, backend_of
from orchestrator.cluster.config import Cluster, load_cluster
from orchestrator.cluster.job import ON_ITS_WAY, OVER, Job, JobRecord, JobStatus, all_jobs, new_job
from orchestrator.config import SweepConfig
from orchestrator.storage.address import is_bucket
from orchestrator.storage.opened import local_root
from orchestrator.validation import explain
from qkmodel.errors import InputError

_ASKED_AT_ONCE = 32


def for_cluster(config: SweepConfig, name: str) -> tuple[SweepConfig, Cluster]:
    """The sweep as it is to be on the cluster, and the cluster. Raises InputError."""
    cluster = load_cluster(name)
    if cluster.storage is not None:
        values = config.model_dump(exclude_unset=True) | {"storage": cluster.storage}
        try:
            config = SweepConfig.model_validate(values)
        except ValidationError as error:
            # a bucket asks more of a sweep file than a folder does
            complaint = redact_url(explain(error, values, SweepConfig))
            raise InputError(f"--cluster: {name} has storage {cluster.storage}, and the sweep's {complaint}") from None
    return config, cluster


def submit(config: SweepConfig, cluster_name: str) -> Job:
    """Hands a sweep to a cluster. Raises InputError, and leaves nothing behind, when it cannot be run there."""
    config, cluster = for_cluster(config, cluster_name)
    backend = backend_of(cluster)
    with _alone():
        # first, since it has a cluster that does not answer refused at once: each of its jobs would take as long
        backend.check(config)
        _refuse_twice(config)
        job = new_job(config, cluster_name, cluster)
        try:
            backend.submit(job)
        except NoAnswer:
            # it may have arrived: the job stays, and its status tells
            raise
        except (InputError, OSError):
            shutil.rmtree(job.folder)
            raise
    return job


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Against another submission from this folder, which would not see the job yet; no file is left of it."""
    folder = os.open(".", os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _refuse_twice(config: SweepConfig) -> None:
    """Two jobs of a sweep would wait for each other's lease, on the cluster's time."""
    same = [job for job in all_jobs()[0] if job.record.sweep == config.name and _same_place(job, config)]
    for job, status in known_statuses(same):
        # of a cluster that cannot be asked any more, nothing is known
        if status.state in ON_ITS_WAY:
            raise InputError(
                f"name: job {job.id} of this sweep is not over yet; follow it with orchestrate logs -f {job.id}, or "
                f"end it with orchestrate cancel {job.id}"
            )


def _same_place(job: Job, config: SweepConfig) -> bool:
    if is_bucket(job.record.storage) or is_bucket(config.storage):
        return local_root(job.record.storage) == local_root(config.storage)
    written = Path(job.record.working_directory, Path(job.record.storage).expanduser())
    return os.path.normpath(written) == os.path.normpath(Path(config.storage).expanduser().absolute())


def status_of(job: Job) -> JobStatus:
    """Where a job is. Raises InputError when its cluster cannot be asked."""
    kept = job.over()
    if kept is not None:
        return kept
    status = backend_of_job(job).status(job)
    # what is lost may only be late: a shared folder shows files of other machines after a while
    if status.state in OVER and status.state != "lost":
        job.keep_over(status)
    return status


def backend_of_job(job: Job) -> Backend:
    """That of the cluster as it was when the job was submitted."""
    return backend_of(job.record.cluster)


def cancel(job: Job) -> None:
    """Has a job end. Raises InputError when it has ended, or its cluster cannot be asked."""
    status = status_of(job)
    if status.state in OVER:
        raise InputError(f"{job.id}: is over ({status.state}); there is nothing to cancel")
    with job.cancelling():
        backend_of_job(job).cancel(job)


def script_of(config: SweepConfig, cluster_name: str) -> str:
    """What would be handed over, with JOB where the job's folder would stand."""
    config, cluster = for_cluster(config, cluster_name)
    record = JobRecord(
        sweep=config.name,
        cluster_name=cluster_name,
        cluster=cluster,
        storage=config.storage,
        working_directory=str(Path.cwd()),
        submitted=datetime.now().astimezone(),
        handle="NAME",
    )
    return backend_of(cluster).script(Job(Path("JOB"), record), config)


def jobs_table(jobs: list[tuple[Job, JobStatus]]) -> Table:
    """One line for each job."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("job", "cluster", "state", "submitted", ""):
        table.add_column(column, overflow="fold")
    for job, status in jobs:
        submitted = job.record.submitted.astimezone().strftime("%Y-%m-%d %H:%M")
        table.add_row(job.id, job.record.cluster_name, status.state, submitted, status.detail)
    return table


def known_statuses(jobs: Sequence[Job]) -> list[tuple[Job, JobStatus]]:
    """Each with its status; `unknown`, with the reason, where its cluster cannot be asked."""
    # together: clusters that do not answer are waited for
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        return list(zip(jobs, pool.map(_known_status, jobs), strict=True))


def _known_status(job: Job) -> JobStatus:
    try:
        return status_of(job)
    except InputError as error:
        return JobStatus(state="unknown", detail=str(error))
