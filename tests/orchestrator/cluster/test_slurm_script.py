"""The batch script: what SLURM is asked for, and that nothing a person writes is taken for shell."""

import shutil
import subprocess
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.cluster.config import SlurmCluster
from orchestrator.cluster.job import Job, JobRecord
from orchestrator.cluster.slurm import SlurmBackend
from orchestrator.config import load_sweep

SWEEP = load_sweep(Path(__file__).parents[3] / "sweeps" / "l1.yaml")


def script(folder: str = "/runs/jobs/l1-1", **keys: object) -> str:
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
    return SlurmBackend(cluster).script(Job(Path(folder), record), SWEEP)


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
    export, _, _ = rest.partition("\n# Told to end")
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
