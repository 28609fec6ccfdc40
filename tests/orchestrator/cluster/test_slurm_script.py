"""The batch script: what SLURM is asked for, and that nothing a person writes is taken for shell."""

import os
import shutil
import subprocess
import time
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.cluster import slurm
from orchestrator.cluster.config import SlurmCluster
from orchestrator.cluster.job import Job, JobRecord
from orchestrator.cluster.slurm import SlurmBackend
from orchestrator.config import load_sweep

# a head whose own name is no address at which others reach it; a requeue ends the script
PROGRAMS = {
    "scontrol": """case "$*" in
        *hostnames*) printf 'node1\\nnode2\\n' ;;
        *node*) echo "NodeName=node1 NodeAddr=node1 NodeHostName=node1" ;;
        requeue*) touch requeued; kill -KILL $PPID ;;
    esac""",
    "getent": "echo 127.0.1.1 STREAM node1",
    "hostname": "echo 'fd00::1 10.0.0.5 172.17.0.1 '",
    "squeue": "echo RUNNING",
}
SWEEP = load_sweep(Path(__file__).parents[3] / "sweeps" / "l1.yaml")


def job_of(folder: str = "/runs/jobs/l1-1", **keys: object) -> tuple[SlurmBackend, Job]:
    cluster = SlurmCluster.model_validate({"backend": "slurm"} | keys)
    record = JobRecord(
        sweep="l1",
        cluster_name="hpc",
        cluster=cluster,
        storage="runs",
        working_directory="/home/me",
        submitted=datetime.now().astimezone(),
        handle="qk-l1-0",
    )
    return SlurmBackend(cluster), Job(Path(folder), record)


def script(folder: str = "/runs/jobs/l1-1", **keys: object) -> str:
    backend, job = job_of(folder, **keys)
    return backend.script(job, SWEEP)


def options(text: str) -> set[str]:
    return {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")}


def test_what_the_cluster_says_is_asked_of_slurm() -> None:
    text = script(
        nodes=2,
        partition="gpu",
        account="interp",
        time="8:00:00",
        gpus_per_node=4,
        cpus_per_node=32,
        memory_per_node="64G",
        grace_seconds=120,
        options=["--qos=high"],
    )
    assert options(text) == {
        "--job-name=qk-l1-0",
        "--exclusive",
        "--open-mode=append",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=32",
        "--partition=gpu",
        "--account=interp",
        "--time=8:00:00",
        "--mem=64G",
        "--gpus-per-node=4",
        "--qos=high",
        "--requeue",
        "--signal=B:TERM@120",
    }
    assert "symmetric-run" in text and "symmetric-run" not in script()


def test_what_is_not_said_is_left_to_slurm() -> None:
    assert not any(
        word in script() for word in ("--partition", "--account", "--time", "--mem", "--gpus", "module load")
    )


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=40))
def test_a_value_of_the_environment_arrives_as_it_is(value: str) -> None:
    text = script(environment={"SOMETHING": value})
    begin, _, rest = text.partition("export SOMETHING=")
    export, _, _ = rest.partition("\nset -u\n")
    ran = subprocess.run(
        ["bash", "-c", f'export SOMETHING={export}\nprintf %s "$SOMETHING"'], capture_output=True, check=True
    )
    assert ran.stdout.decode() == value and begin.startswith("#!/bin/bash")


@pytest.mark.parametrize("nodes", [1, 3])
def test_the_script_is_bash(nodes: int) -> None:
    text = script(
        folder="/a folder/it's", nodes=nodes, modules=["cuda/13"], setup=["source ~/x"], environment={"A": "b c"}
    )
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    if shutil.which("shellcheck"):
        checked = subprocess.run(
            ["shellcheck", "--exclude=SC1090,SC2317", "-"], input=text, text=True, capture_output=True
        )
        assert checked.stdout == ""


def started(folder: Path, nodes: int, srun: str) -> subprocess.Popen[bytes]:
    """The script on a SLURM that is played, in `folder`, once it has come to its step."""
    (folder / "bin").mkdir()
    for name, lines in (PROGRAMS | {"srun": f'echo "$@" > step\n{srun}'}).items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{lines}\n")
        (folder / "bin" / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}/bin:{os.environ['PATH']}"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]"}
    # Python's folder goes before, and may hold programs of these names
    text = script(folder=str(folder), nodes=nodes).replace("export PATH=", "python_folder=")
    process = subprocess.Popen(["bash", "-c", text], cwd=folder, env=environment)
    deadline = time.monotonic() + 30
    while not (folder / "step").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def test_nodes_find_the_head_by_an_address_and_are_let_go_when_its_sweep_has_ended(tmp_path: Path) -> None:
    process = started(tmp_path, 2, """echo '{"code":3}' > exit.json; exec sleep 60""")
    assert process.wait(timeout=30) == 3
    assert "--address 10.0.0.5:6379 " in (tmp_path / "step").read_text()


@pytest.mark.parametrize("nodes", [1, 2])
def test_told_to_end_before_the_sweep_is_there_it_goes_back_into_the_queue(tmp_path: Path, nodes: int) -> None:
    process = started(tmp_path, nodes, "exec sleep 60")
    process.terminate()
    process.wait(timeout=15)
    assert (tmp_path / "requeued").exists()


@pytest.mark.parametrize(("code", "back"), [(143, True), (137, False), (1, False)])
def test_a_step_that_was_told_to_end_goes_back_though_it_left_no_word(tmp_path: Path, code: int, back: bool) -> None:
    """As other jobs' preemption does to several nodes: it ends Ray together with the sweep."""
    started(tmp_path, 2, f"sleep 0.2; exit {code}").wait(timeout=15)
    assert (tmp_path / "requeued").exists() == back


def test_cancelling_tells_the_script_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(slurm, "_ask", lambda *command: asked.append(command) or "")
    backend, job = job_of()
    backend.cancel(job)
    running = [command for command in asked if not any("--state=" in word for word in command)]
    assert running == [("scancel", "--batch", "--signal=TERM", "--name=qk-l1-0")]
