"""A SLURM of two nodes, each a host with an address of its own: one job trains on both."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system import hosts, slurm
from tests.system.desk import Desk
from tests.system.test_hosts import wait

pytestmark = [pytest.mark.system, pytest.mark.slow]

# packs of one, so that both nodes have work
LONG = ("name=long", "pack=1", "training.tokens=65_536", "training.report_tokens=4096")


@pytest.fixture
def cluster() -> Iterator[slurm.SlurmHosts]:
    if not (hosts.is_possible() and slurm.is_installed()):
        pytest.skip("apt-get install slurmctld slurmd slurm-client munge iproute2, as root")
    cluster = slurm.SlurmHosts(nodes=2)
    yield cluster
    cluster.close()


def test_a_job_trains_on_two_nodes_goes_back_into_the_queue_when_it_is_told_to_end_and_on(
    cluster: slurm.SlurmHosts, tmp_path: Path
) -> None:
    settings = {"backend": "slurm", "nodes": 2, "partition": "work", "grace_seconds": 40}
    desk = Desk(tmp_path, settings, cluster.environment)
    job = desk.submit(*LONG)
    wait("both nodes train", lambda: cluster.trains(1) and cluster.trains(2))
    desk.wait_for_reports("long", 4096)

    (number,) = cluster.ask("squeue", "--noheader", "--format=%A").split()
    cluster.ask("scancel", "--batch", "--signal=TERM", number)
    # before a time limit would end it
    desk.wait(job, "pending", patience=settings["grace_seconds"])
    cluster.ask("scontrol", "update", f"jobid={number}", "StartTime=now")
    wait("both nodes train again", lambda: cluster.trains(1) and cluster.trains(2))
    assert desk.wait(job, "finished", "failed", "lost", "interrupted", "cancelled", every=3) == "finished"
    said = desk.ask("logs", job)[0]
    assert said.count("interrupted; the same command continues where it was") == 1
    # what Ray says of its end is elsewhere
    assert "front of" in said and "Killed" not in said

    desk.ask("sweep", "first.yaml", *LONG, "name=alone")
    assert desk.hashes("long") == desk.hashes("alone") and None not in desk.hashes("long").values()
