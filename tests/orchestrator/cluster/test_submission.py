"""Submitting: what is refused before a cluster is asked, and two at once; clusters that do not answer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cluster.backend import refuse_relative_tracking
from orchestrator.cluster.config import LocalCluster, SlurmCluster
from orchestrator.cluster.job import JobStatus, new_job
from orchestrator.cluster.slurm import SlurmBackend
from orchestrator.cluster.submission import for_cluster, known_statuses, submit
from orchestrator.config import load_sweep
from qkmodel.errors import InputError
from tests.orchestrator.sweep_files import write_sweep

SUBMIT = """
import sys, time
from pathlib import Path
from orchestrator.cluster import submission
from orchestrator.cluster.local import LocalBackend
from orchestrator.config import load_sweep
from qkmodel.errors import InputError

LocalBackend.check = lambda self, config: time.sleep(1)
LocalBackend.submit = lambda self, job: None
LocalBackend.status = lambda self, job: submission.JobStatus(state="running")
try:
    print(submission.submit(load_sweep(Path(sys.argv[1]), []), "local").id)
except InputError as error:
    print(error)
"""


def test_of_two_submissions_at_one_moment_one_is_refused(tmp_path: Path) -> None:
    file = write_sweep(tmp_path)
    both = [
        subprocess.Popen([sys.executable, "-c", SUBMIT, str(file)], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert len(list((tmp_path / "runs" / "jobs").iterdir())) == 1
    assert sum("of this sweep is not over yet" in line for line in said) == 1


@pytest.mark.parametrize("tracking", ["sqlite:///mlflow.db", "sqlite:///a/b.db"])
def test_a_database_in_a_folder_that_is_thrown_away_is_refused(tracking: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^tracking: sqlite:///\S+ is relative, and the sweep runs elsewhere"):
        refuse_relative_tracking(load_sweep(write_sweep(tmp_path, tracking=tracking), []))


@pytest.mark.parametrize("tracking", [None, "http://mlflow:5000", "sqlite:////data/mlflow.db", "postgresql://h/mlflow"])
def test_other_stores_are_not(tracking: str | None, tmp_path: Path) -> None:
    refuse_relative_tracking(load_sweep(write_sweep(tmp_path, tracking=tracking), []))


def test_a_bucket_that_does_not_do_is_refused_before_slurm_or_the_bucket_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, storage: str) -> None:
        raise InputError(f"storage: {storage}: no server answers")

    monkeypatch.setattr("orchestrator.cluster.slurm.check_storage", refuse)
    servers = {"ledger": "postgresql://localhost:9/ledgers", "tracking": "http://localhost:9"}
    config = load_sweep(write_sweep(tmp_path, storage="s3://bucket/runs?endpoint_override=127.0.0.1:9", **servers))
    with pytest.raises(InputError, match=r"^storage: s3://bucket/runs\S+ no server answers$"):
        SlurmBackend(SlurmCluster(backend="slurm")).check(config)


def test_a_bucket_of_the_clusters_file_that_the_sweep_does_not_go_with_is_one_line(tmp_path: Path) -> None:
    cluster = tmp_path / "hpc.yaml"
    cluster.write_text("backend: slurm\nstorage: s3://bucket/runs\n")
    config = load_sweep(write_sweep(tmp_path, tracking="http://me:hunter2@mlflow:5000"), [])
    with pytest.raises(
        InputError, match=r"has storage s3://bucket/runs, and the sweep's ledger: is left out"
    ) as refused:
        for_cluster(config, str(cluster))
    assert "\n" not in str(refused.value) and "hunter2" not in str(refused.value)


@pytest.fixture
def silent_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SLURM that never answers; `asked` in the folder lists its commands that were tried."""
    for name in ("sinfo", "squeue"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\necho {name} >> {tmp_path}/asked\nexec sleep 60\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("orchestrator.cluster.slurm.ANSWER_SECONDS", 0.5)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hpc.yaml").write_text("backend: slurm\n")
    return tmp_path


def test_a_cluster_that_does_not_answer_is_waited_for_once_whatever_jobs_it_has(silent_slurm: Path) -> None:
    config = load_sweep(write_sweep(silent_slurm))
    for _ in range(2):
        new_job(config, "hpc.yaml", SlurmCluster(backend="slurm"))
    with pytest.raises(InputError, match="sinfo: SLURM did not answer"):
        submit(config, "hpc.yaml")
    assert (silent_slurm / "asked").read_text() == "sinfo\n"


def test_a_job_whose_cluster_does_not_answer_is_unknown(silent_slurm: Path) -> None:
    job = new_job(load_sweep(write_sweep(silent_slurm)), "hpc.yaml", SlurmCluster(backend="slurm"))
    assert known_statuses([job]) == [
        (job, JobStatus(state="unknown", detail="squeue: SLURM did not answer within 0 s"))
    ]
    assert known_statuses([]) == []


def test_jobs_are_asked_about_together(silent_slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.cluster.slurm.ANSWER_SECONDS", 20.0)
    config = load_sweep(write_sweep(silent_slurm))
    jobs = [new_job(config, "hpc.yaml", SlurmCluster(backend="slurm")) for _ in range(6)]
    # answers nobody before all six have asked
    (silent_slurm / "bin" / "squeue").write_text(
        f"#!/bin/sh\necho >> {silent_slurm}/asked\n"
        f"until [ $(wc -l < {silent_slurm}/asked) -ge 6 ]; do sleep 0.1; done\necho 'PENDING|Priority||7'\n"
    )
    assert known_statuses(jobs) == [(job, JobStatus(state="pending", detail="SLURM job 7, Priority")) for job in jobs]


def test_a_job_of_which_nothing_is_known_refuses_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("orchestrator.cluster.local.LocalBackend.check", lambda self, config: None)
    monkeypatch.setattr("orchestrator.cluster.local.LocalBackend.submit", lambda self, job: None)
    config = load_sweep(write_sweep(tmp_path))
    # begun on a machine that has another name now
    elsewhere = new_job(config, "local", LocalCluster())
    (elsewhere.folder / "process.json").write_text('{"host": "elsewhere", "pid": 1, "created": 1.0}')
    assert submit(config, "local").id == "small-2"


@pytest.mark.parametrize(
    ("begun", "cancelled", "state"), [(False, False, "failed"), (True, False, "lost"), (False, True, "cancelled")]
)
def test_a_slurm_job_that_fails_before_the_sweep_begins_is_not_to_be_submitted_again(
    begun: bool, cancelled: bool, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = new_job(load_sweep(write_sweep(tmp_path)), "hpc", SlurmCluster(backend="slurm"))
    monkeypatch.setattr("orchestrator.cluster.slurm._ask", lambda *command: "FAILED|NonZeroExitCode|node1|7\n")
    if begun:
        (job.folder / "process.json").write_text('{"host": "node1", "pid": 1, "created": 1.0}')
    if cancelled:
        with job.cancelling():
            pass
    assert known_statuses([job])[0][1].state == state
