"""What keeps a cluster from running a sweep is one line within 15 s, before anything is started."""

import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system import slurm
from tests.system.desk import Desk
from tests.system.services import RayCluster, free_port
from tests.system.test_clusters import LONG

pytestmark = [pytest.mark.system, pytest.mark.slow]
# for as long as a test takes
RATES = ",".join(f"{index}e-4" for index in range(1, 31))
ENDLESS = (*LONG, f"search.space.learning_rate=[{RATES}]", "search.trainings=60")


@pytest.fixture(scope="module")
def ray_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def ray_cluster(ray_port: int) -> Iterator[RayCluster]:
    cluster = RayCluster(nodes=0, dashboard_port=ray_port, head_cpus=1)
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def slurm_cluster() -> Iterator[slurm.Slurm]:
    if not slurm.is_installed():
        pytest.skip("apt-get install slurmctld slurmd slurm-client munge, as root")
    cluster = slurm.Slurm()
    yield cluster
    cluster.close()


def refusal(desk: Desk) -> str:
    """The one line of a submission that is refused, in time, and leaves nothing behind."""
    began = time.monotonic()
    _, err = desk.ask("submit", "first.yaml", "--cluster", "mine", code=2)
    assert time.monotonic() - began < 15
    assert err.count("\n") == 1 and err.startswith("error: ")
    assert not (desk.folder / "runs").exists() and not (desk.folder / "store").exists()
    return err


def test_a_ray_cluster_that_cannot_be_reached_lets_nobody_in_or_has_no_place(
    ray_cluster: RayCluster, ray_port: int, tmp_path: Path
) -> None:
    token = ray_cluster.client_environment["RAY_AUTH_TOKEN_PATH"]
    (tmp_path / "wrong").write_text("0" * 64)
    good = {
        "backend": "ray",
        "address": f"http://127.0.0.1:{ray_port}",
        "token_file": token,
        "python": sys.executable,
    }
    for number, (change, line) in enumerate(
        [
            ({"address": f"http://127.0.0.1:{free_port()}"}, "nobody answers"),
            ({"token_file": None}, "does not let you in without its token"),
            ({"token_file": str(tmp_path / "wrong")}, "does not let you in without its token"),
            ({"token_file": "/nowhere"}, "token_file: /nowhere: there is no such file"),
            ({"storage": "runs"}, "storage: runs is relative"),
            ({"storage": "/proc/runs"}, "storage: /proc cannot be written to"),
            (
                {"python": "/usr/bin/python3"},
                "python: /usr/bin/python3 on the cluster's head does not have",
            ),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert line in refusal(Desk(folder, good | change, {}))


def test_a_dashboard_that_accepts_and_never_answers(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        settings = {"backend": "ray", "address": address, "storage": str(tmp_path / "store")}
        assert "did not answer within" in refusal(Desk(tmp_path, settings, {}))


def test_a_pack_that_no_node_can_hold_is_refused(ray_cluster: RayCluster, tmp_path: Path) -> None:
    desk = Desk(tmp_path, {"backend": "local"}, ray_cluster.client_environment)
    _, err = desk.ask("sweep", "first.yaml", "resources.pack.cpu=4", code=2)
    assert "resources.pack: no node of the cluster has 4 CPUs for a pack" in err
    assert not (tmp_path / "store").exists()


def test_a_node_that_does_not_share_the_storage_is_named(ray_cluster: RayCluster, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a node with a folder of its own needs a mount, and that needs root")
    desk = Desk(tmp_path, {"backend": "local"}, ray_cluster.client_environment)
    (tmp_path / "store").mkdir()
    hide = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {tmp_path}/store && exec "$0" "$@"')
    ray_cluster.add_node(before=hide)
    try:
        _, err = desk.ask("sweep", "first.yaml", code=2)
        assert "store/first: on node" in err and "it is another folder, or none" in err
        assert list((tmp_path / "store").iterdir()) == []
    finally:
        ray_cluster.kill_node(0)


def test_a_slurm_without_the_partition_or_without_a_controller(slurm_cluster: slurm.Slurm, tmp_path: Path) -> None:
    for name, environment, line in [
        ("partition", slurm_cluster.environment, "partition: gpu is none of this cluster's; it has work"),
        ("controller", {"SLURM_CONF": str(tmp_path / "slurm.conf")}, "sinfo: "),
    ]:
        folder = tmp_path / name
        folder.mkdir()
        (tmp_path / "slurm.conf").write_text(
            Path(slurm_cluster.environment["SLURM_CONF"]).read_text().replace("SlurmctldPort=", "SlurmctldPort=1")
        )
        assert line in refusal(Desk(folder, {"backend": "slurm", "partition": "gpu"}, environment))


def test_a_slurm_job_that_is_told_to_end_goes_back_into_the_queue_and_goes_on(
    slurm_cluster: slurm.Slurm, tmp_path: Path
) -> None:
    desk = Desk(tmp_path, {"backend": "slurm", "partition": "work"}, slurm_cluster.environment)
    job = desk.submit(*LONG)
    desk.wait_for_reports("long", 4096)
    (number,) = slurm_cluster.ask("squeue", "--noheader", "--format=%A").split()
    slurm_cluster.ask("scancel", "--signal=TERM", number)
    desk.wait(job, "pending")
    # SLURM itself would wait two minutes
    slurm_cluster.ask("scontrol", "update", f"jobid={number}", "StartTime=now")
    assert desk.wait(job, "finished", "failed", "lost", "interrupted", "cancelled") == "finished"
    said = desk.ask("logs", job)[0]
    assert said.count("interrupted; the same command continues where it was") == 1
    assert f"job {number} goes back into the queue" in said
    desk.ask("sweep", "first.yaml", *LONG, "name=alone")
    assert desk.hashes("long") == desk.hashes("alone")


def goes_on(slurm_cluster: slurm.Slurm, desk: Desk, job: str) -> None:
    """The job is back in the queue; begun again, it gets further than it was, and is cancelled."""
    (number,) = slurm_cluster.ask("squeue", "--noheader", "--partition=work", "--format=%A").split()
    slurm_cluster.ask("scontrol", "update", f"jobid={number}", "StartTime=now")
    before, deadline = desk.tokens("long"), time.monotonic() + 300
    while desk.tokens("long") == before:
        assert time.monotonic() < deadline, desk.ask("logs", job)[0]
        time.sleep(1)
    said = desk.ask("logs", job)[0]
    assert said.count("interrupted; the same command continues where it was") == 1
    assert f"job {number} goes back into the queue" in said
    desk.ask("cancel", job)
    assert desk.wait(job, "cancelled", "lost", "failed", "interrupted", "finished") == "cancelled"


def test_a_slurm_job_whose_time_is_over_goes_back_into_the_queue(slurm_cluster: slurm.Slurm, tmp_path: Path) -> None:
    settings = {"backend": "slurm", "partition": "work", "time": "3", "grace_seconds": 30}
    desk = Desk(tmp_path, settings, slurm_cluster.environment)
    job = desk.submit(*ENDLESS)
    desk.wait_for_reports("long", 2048)
    desk.wait(job, "pending")
    goes_on(slurm_cluster, desk, job)


def test_a_slurm_job_that_another_goes_before_waits_for_its_end(slurm_cluster: slurm.Slurm, tmp_path: Path) -> None:
    desk = Desk(tmp_path, {"backend": "slurm", "partition": "work"}, slurm_cluster.environment)
    job = desk.submit(*ENDLESS)
    desk.wait_for_reports("long", 2048)
    slurm_cluster.ask("sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")
    desk.wait(job, "pending")
    deadline = time.monotonic() + 120
    while slurm_cluster.ask("squeue", "--noheader", "--partition=urgent").strip():
        assert time.monotonic() < deadline
        time.sleep(1)
    goes_on(slurm_cluster, desk, job)


def test_a_slurm_job_that_scancel_ends_stays_ended(slurm_cluster: slurm.Slurm, tmp_path: Path) -> None:
    desk = Desk(tmp_path, {"backend": "slurm", "partition": "work"}, slurm_cluster.environment)
    job = desk.submit(*LONG)
    desk.wait_for_reports("long", 2048)
    slurm_cluster.ask("scancel", "--user=root")
    assert desk.wait(job, "interrupted", "cancelled", "pending", "lost", "failed") in ("interrupted", "cancelled")
    assert slurm_cluster.ask("squeue", "--noheader").strip() == ""
    # its sweep goes on in the next one
    again = desk.submit(*LONG)
    assert desk.wait(again, "finished", "failed", "lost", "interrupted") == "finished"
