"""A worker, Ray itself and the driver are killed or interrupted in the middle of real trainings."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import psutil
import pytest

from orchestrator import packs_on_ray
from orchestrator.checkpoints import newest_checkpoint
from orchestrator.config import PackResources
from orchestrator.process_end import INTERRUPTED
from orchestrator.storage.shared import SHARED
from tests.orchestrator import pack_world
from tests.orchestrator.sweep_files import write_sweep
from tests.system.test_first_sweep import Sweep, wait_until_training

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Long enough to be interrupted three times."""
    return Sweep.create(tmp_path_factory.mktemp("interrupted") / "first", tokens=32_768, report_tokens=1024)


def below(driver: int, name: str) -> list[psutil.Process]:
    """Ray's processes of that name, waited for."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        # a process may end while it is looked at
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(driver).children(recursive=True)
            if found := [one for one in children if name in " ".join(one.cmdline())]:
                return found
        time.sleep(0.1)
    raise TimeoutError(f"no {name} within 60 s")


def test_sigterm_while_ray_starts_is_answered_as_at_any_other_time(sweep: Sweep) -> None:
    with sweep.started("sweep", "first.yaml") as (process, output):
        deadline = time.monotonic() + 300
        while "starting" not in (output / "err").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        below(process.pid, "gcs_server")
        process.terminate()
        assert process.wait(timeout=30) == 143
        assert (output / "err").read_text().splitlines()[-1] == INTERRUPTED.strip()


def test_interruptions_are_one_line_each_and_the_same_command_continues(sweep: Sweep) -> None:
    with sweep.started("sweep", "first.yaml") as (process, output):
        wait_until_training(sweep, process, output)
        assert {worker.nice() for worker in below(process.pid, "ray::ResourceTrainable")} == {psutil.Process().nice()}
        # below the raylet, which then declares its node dead
        (agent,) = below(process.pid, "ray::DashboardAgent")
        agent.kill()
        assert process.wait(timeout=120) == 1
        *before, last = (output / "err").read_text().splitlines()
        assert last == "error: Ray ended; the same command continues the sweep where it was"
        assert "Traceback" not in "".join(before)
        assert {training.state for training in sweep.trainings()} == {"open"}

    with sweep.started("sweep", "first.yaml") as (process, output):
        wait_until_training(sweep, process, output)
        done = {training.training_id: training.tokens_done for training in sweep.trainings()}
        asked = time.monotonic()
        process.terminate()
        assert process.wait(timeout=120) == 143
        assert time.monotonic() - asked < 10
        # every pack wrote where it was, between two reports
        for training, tokens in done.items():
            _, header = newest_checkpoint(sweep.storage / "first", training)
            assert header.steps_done * 8 * 128 >= tokens
        *before, last = (output / "err").read_text().splitlines()
        assert last == "interrupted; the same command continues where it was"
        assert "Traceback" not in "".join(before)
        assert not (sweep.storage / "first" / ".tune").exists()

    with sweep.started("sweep", "first.yaml", "--json") as (process, output):
        wait_until_training(sweep, process, output)
        below(process.pid, "ray::ResourceTrainable")[0].kill()
        assert process.wait(timeout=300) == 0
        assert json.loads((output / "out").read_text())["sweep"] == "first"
        said = (output / "err").read_text()
        assert "its worker died; it is tried again" in said
        assert [word for word in ("Traceback", "ERROR", "raylet", "did not complete") if word in said] == []


def test_the_end_of_ray_is_noticed_while_no_pack_runs_and_none_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune makes no step then: for up to ten minutes it does nothing but ask for a pack."""
    asked = itertools.count()
    killed_at = []

    def no_room() -> int:
        # the second time it is in that loop
        if next(asked) == 1:
            below(os.getpid(), "ray::DashboardAgent")[0].kill()
            killed_at.append(time.monotonic())
        return 0

    monkeypatch.setattr(packs_on_ray, "Capacity", lambda pack: no_room)
    resources = SimpleNamespace(pack=PackResources(cpu=1))
    plan = SimpleNamespace(folder=tmp_path, storage=SHARED, config=SimpleNamespace(name="ends", resources=resources))
    queue = pack_world.start(tmp_path).queue
    with mock.patch.dict(os.environ), pytest.raises(packs_on_ray.RayStopped):
        packs_on_ray.train_packs(plan, queue, start=1)
    assert time.monotonic() - killed_at[0] < 30


def test_sigterm_after_ray_has_ended_is_answered_as_before() -> None:
    """On a cluster, Ray is asked and left again before the activation cache is built."""
    program = """
import os, signal, sys
from orchestrator.ray_connection import connected_ray
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(7))
with connected_ray():
    pass
os.kill(os.getpid(), signal.SIGTERM)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 7


@pytest.mark.parametrize("after_seconds", [0.2, 1.0, 2.5])
def test_ctrl_c_in_the_first_seconds_is_one_line(tmp_path: Path, after_seconds: float) -> None:
    file = write_sweep(tmp_path)
    command = [sys.executable, "-m", "orchestrator", "sweep", str(file), "--dry-run"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(after_seconds)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted; the same command continues where it was" and "Traceback" not in err


@pytest.mark.slow
def test_a_signal_to_the_whole_process_group_is_answered_in_time(tmp_path: Path) -> None:
    """As service managers and `timeout` send it: Ray's own processes get it too."""
    sweep = Sweep.create(tmp_path / "first", tokens=65_536, report_tokens=1024)
    with sweep.started("sweep", "first.yaml") as (process, output):
        wait_until_training(sweep, process, output)
        asked = time.monotonic()
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60) == 143
        assert time.monotonic() - asked < 15
        assert (output / "err").read_text().splitlines()[-1] == INTERRUPTED.rstrip()
