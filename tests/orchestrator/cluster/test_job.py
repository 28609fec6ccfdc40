"""Jobs on disk: the file that they run, their names, and what their states are read from."""

import json
import os
import signal
import stat
import subprocess
from pathlib import Path

import psutil
import pytest

from orchestrator.cli import run
from orchestrator.cluster.config import LocalCluster, RayCluster
from orchestrator.cluster.job import EXIT, RECORD, SWEEP, JobStatus, all_jobs, new_job, open_job, resolved_yaml
from orchestrator.cluster.job_process import write_process
from orchestrator.cluster.local import LocalBackend
from orchestrator.cluster.submission import cancel, status_of, submit
from orchestrator.config import load_sweep
from qkmodel.errors import InputError
from tests.orchestrator.sweep_files import write_sweep

SWEEPS = sorted((Path(__file__).parents[3] / "sweeps").glob("*.yaml"))


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
@pytest.mark.parametrize("overrides", [[], ["training.tokens=100_000_000", "name=other"]], ids=["as_is", "overridden"])
def test_the_resolved_file_loads_as_the_sweep_that_was_submitted(file: Path, overrides: list[str]) -> None:
    config = load_sweep(file, overrides)
    written = Path("sweep.yaml")
    written.write_text(resolved_yaml(config))
    again = load_sweep(written)
    assert again == config
    # what is silently cut where nobody wrote it must not count as written
    assert again.training.model_fields_set == config.training.model_fields_set


def test_jobs_are_counted_by_sweep_and_only_their_owner_reads_them(tmp_path: Path) -> None:
    config = load_sweep(write_sweep(tmp_path))
    jobs = [new_job(config, "local", LocalCluster()) for _ in range(3)]
    assert [job.id for job in jobs] == ["small-1", "small-2", "small-3"]
    assert [job.id for job in all_jobs()[0]] == ["small-1", "small-2", "small-3"]
    assert stat.S_IMODE(jobs[0].folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((jobs[0].folder / SWEEP).stat().st_mode) == 0o600
    assert open_job("small-2").record == jobs[1].record == open_job(str(jobs[1].folder)).record


def test_what_is_no_job_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="small-1: no job of that name"):
        open_job("small-1")
    job = new_job(load_sweep(write_sweep(tmp_path)), "local", LocalCluster())
    (job.folder / RECORD).write_text("{")
    with pytest.raises(InputError, match=r"job\.json: is damaged"):
        open_job(job.id)
    other = new_job(load_sweep(write_sweep(tmp_path)), "local", LocalCluster())
    readable, (complaint,) = all_jobs()
    assert [one.id for one in readable] == [other.id] and "is damaged" in complaint


@pytest.mark.parametrize(
    ("code", "cancelled", "state"),
    [
        (0, False, "finished"),
        (0, True, "finished"),
        (1, False, "failed"),
        (2, False, "failed"),
        (143, False, "interrupted"),
        (130, False, "interrupted"),
        (143, True, "cancelled"),
        (137, True, "cancelled"),
        (137, False, "failed"),
    ],
)
def test_an_exit_code_becomes_a_state(tmp_path: Path, code: int, cancelled: bool, state: str) -> None:
    job = new_job(load_sweep(write_sweep(tmp_path)), "local", LocalCluster())
    if cancelled:
        with job.cancelling():
            pass
    (job.folder / EXIT).write_text(json.dumps({"code": code}))
    assert LocalBackend(LocalCluster()).status(job).state == state


def test_a_process_that_is_gone_is_lost_and_another_with_its_number_is_not_it(tmp_path: Path) -> None:
    job = new_job(load_sweep(write_sweep(tmp_path)), "local", LocalCluster())
    backend = LocalBackend(LocalCluster())
    assert backend.status(job).state == "lost"
    here = os.uname().nodename
    for record, state in [
        ({"host": here, "pid": os.getpid(), "created": 1.0}, "lost"),
        ({"host": here, "pid": os.getpid(), "created": psutil.Process().create_time()}, "running"),
        ({"host": "elsewhere", "pid": 1, "created": 1.0}, "unknown"),
    ]:
        (job.folder / "process.json").write_text(json.dumps(record))
        assert backend.status(job).state == state
    # damaged by a full disk, say
    (job.folder / "process.json").write_text("")
    (job.folder / EXIT).write_text("{")
    assert backend.status(job).state == "lost"


def test_a_cancellation_that_fails_leaves_no_mark(tmp_path: Path) -> None:
    job = new_job(load_sweep(write_sweep(tmp_path)), "local", LocalCluster())
    (job.folder / "process.json").write_text(json.dumps({"host": "elsewhere", "pid": 1, "created": 1.0}))
    with pytest.raises(InputError, match="small-1: runs on elsewhere"):
        cancel(job)
    assert not job.is_cancelled


def test_a_second_cancellation_that_fails_leaves_the_mark_of_the_first(tmp_path: Path) -> None:
    job = new_job(load_sweep(write_sweep(tmp_path)), "local", LocalCluster())
    with job.cancelling():
        pass
    with pytest.raises(InputError), job.cancelling():
        raise InputError("it does not run any more")
    assert job.is_cancelled


def test_what_is_left_of_a_cancelled_job_is_killed_although_some_of_it_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = new_job(load_sweep(write_sweep(tmp_path)), "local", LocalCluster())
    deaf = subprocess.Popen(["sh", "-c", "trap '' TERM; echo; exec sleep 60"], stdout=subprocess.PIPE)
    deaf.stdout.readline()
    gone = subprocess.Popen(["true"])
    left = psutil.Process(gone.pid)
    gone.wait()
    write_process(job.folder, psutil.Process(deaf.pid))
    monkeypatch.setattr("orchestrator.cluster.local.END_SECONDS", 0.1)
    monkeypatch.setattr("psutil.Process.children", lambda self, recursive: [left])
    try:
        cancel(job)
        assert deaf.wait(5) == -signal.SIGKILL
    finally:
        deaf.kill()


def test_a_job_can_be_cancelled_as_soon_as_it_is_submitted(tmp_path: Path) -> None:
    job = submit(load_sweep(write_sweep(tmp_path)), "local")
    assert status_of(job).state == "running"
    cancel(job)
    assert status_of(job).state == "cancelled"


def test_what_was_seen_to_be_over_is_not_asked_for_again_and_an_unknown_cluster_keeps_nobody(tmp_path: Path) -> None:
    config = load_sweep(write_sweep(tmp_path))
    gone = RayCluster(backend="ray", address="http://127.0.0.1:1")
    job = new_job(config, "gone", gone)
    with pytest.raises(InputError, match="nobody answers"):
        status_of(job)
    # what it asked for may be asked for elsewhere
    again = submit(config, "local")
    cancel(again)
    job.keep_over(JobStatus(state="finished"))
    assert status_of(job).state == "finished"


def test_text_that_looks_like_a_number_stays_text(tmp_path: Path) -> None:
    config = load_sweep(write_sweep(tmp_path), ['name="1e5"'])
    Path("sweep.yaml").write_text(resolved_yaml(config))
    assert load_sweep(Path("sweep.yaml")) == config


def test_what_is_over_cannot_be_cancelled(tmp_path: Path) -> None:
    job = new_job(load_sweep(write_sweep(tmp_path)), "local", LocalCluster())
    (job.folder / EXIT).write_text('{"code": 0}')
    with pytest.raises(InputError, match=r"small-1: is over \(finished\)"):
        cancel(job)
    assert not job.is_cancelled


def test_a_sweep_that_cannot_be_planned_is_refused_and_leaves_no_job(tmp_path: Path) -> None:
    config = load_sweep(write_sweep(tmp_path, layers=[99]))
    with pytest.raises(InputError, match="layers: 99 is out of range"):
        submit(config, "local")
    assert not Path("runs").exists()


def test_the_commands_on_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_sweep(tmp_path)
    assert run(["submit", str(file), "--cluster", "local", "--json"]) == 0
    job = json.loads(capsys.readouterr().out)["job"]
    assert run(["cancel", job]) == 0
    assert run(["cancel", job]) == 2
    capsys.readouterr()
    assert run(["jobs", "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["job"], listed["sweep"], listed["state"]) == (job, "small", "cancelled")
    open_job(job).log.write_text("one\ntwo\n")
    assert run(["logs", "--follow", job]) == 0
    assert capsys.readouterr().out == "one\ntwo\n"
    assert run(["logs", "small-9"]) == 2
