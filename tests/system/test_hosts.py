"""A Ray cluster of several hosts, each with an address of its own: one loses its cable, another joins."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system import hosts
from tests.system.desk import PATIENCE, Desk

pytestmark = [pytest.mark.system, pytest.mark.slow]

# packs of one, so that both hosts have work to the end
LONG = (
    "name=long",
    "pack=1",
    "training.tokens=262_144",
    "training.report_tokens=8192",
    "search.space.dictionary_size=[128,192,256,320]",
    "search.trainings=4",
)


@pytest.fixture
def cluster() -> Iterator[hosts.RayHosts]:
    if not hosts.is_possible():
        pytest.skip("network namespaces need root, iproute2 and util-linux")
    cluster = hosts.RayHosts(workers=2)
    yield cluster
    cluster.close()


def wait(what: str, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.3)


def test_a_sweep_outlives_a_host_that_is_cut_off_and_uses_one_that_joins(
    cluster: hosts.RayHosts, tmp_path: Path
) -> None:
    desk = Desk(tmp_path, cluster.settings, {})
    job = desk.submit(*LONG)
    wait("both hosts train", lambda: cluster.trains(2) and cluster.trains(3))
    desk.wait_for_reports("long", 16_384)

    cluster.cut_off(3)
    cluster.add_worker(4)
    wait("the new host trains", lambda: cluster.trains(4))
    assert desk.state(job) == "running"

    desk.ask("cancel", job)
    assert desk.wait(job, "cancelled", "failed", "lost", "finished") == "cancelled"
    again = desk.submit(*LONG)
    followed, _ = desk.ask("logs", "-f", again)
    assert desk.state(again) == "finished" and "front of" in followed, followed

    desk.ask("sweep", "first.yaml", *LONG, "name=alone")
    assert desk.hashes("long") == desk.hashes("alone") and None not in desk.hashes("long").values()
