"""What every backend has to do, on real ones: this machine, a Ray cluster that takes jobs, Debian's SLURM."""

import sys
import time
from collections.abc import Iterator

import pytest

from tests.system import slurm
from tests.system.desk import Desk
from tests.system.services import RayCluster, free_port

pytestmark = pytest.mark.system


@pytest.fixture(
    scope="module",
    params=["local", pytest.param("ray", marks=pytest.mark.slow), pytest.param("slurm", marks=pytest.mark.slow)],
)
def desk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "local":
        yield Desk(folder, {"backend": "local"}, {})
    elif request.param == "ray":
        port = free_port()
        cluster = RayCluster(nodes=0, dashboard_port=port, head_cpus=1)
        try:
            settings = {
                "backend": "ray",
                "address": f"http://127.0.0.1:{port}",
                "python": sys.executable,
                "token_file": cluster.client_environment["RAY_AUTH_TOKEN_PATH"],
            }
            yield Desk(folder, settings, {})
        finally:
            cluster.close()
    else:
        if not slurm.is_installed():
            pytest.skip("apt-get install slurmctld slurmd slurm-client munge, as root")
        cluster = slurm.Slurm()
        try:
            yield Desk(folder, {"backend": "slurm", "partition": "work"}, cluster.environment)
        finally:
            cluster.close()


LONG = ("name=long", "training.tokens=65_536", "training.report_tokens=2048")


@pytest.mark.slow
def test_a_job_runs_to_its_end_cancelled_once_and_submitted_again(desk: Desk) -> None:
    job = desk.submit(*LONG)
    assert desk.ask("submit", "first.yaml", *LONG, "--cluster", "mine", code=2)[1].count("\n") == 1
    desk.wait_for_reports("long", 2048)
    assert desk.state(job) == "running"
    asked = time.monotonic()
    desk.ask("cancel", job)
    assert desk.wait(job, "cancelled", "lost", "failed", "finished") == "cancelled"
    assert time.monotonic() - asked < 45
    assert "interrupted" in desk.ask("logs", job)[0]
    assert "is over (cancelled)" in desk.ask("cancel", job, code=2)[1]

    again = desk.submit(*LONG)
    followed, _ = desk.ask("logs", "-f", again)
    # what is followed to its end ends with what a sweep ends with
    assert "front of" in followed and desk.state(again) == "finished"
    assert followed == desk.ask("logs", again)[0]

    # the same as without any cluster, bit for bit
    desk.ask("sweep", "first.yaml", *LONG, "name=alone")
    assert desk.hashes("long") == desk.hashes("alone") and None not in desk.hashes("long").values()


def test_a_sweep_that_fails_there_is_a_failed_job(desk: Desk) -> None:
    # found out only by the model that is loaded there
    missing = desk.folder / "store" / "gone"
    (desk.folder / "text.txt").write_text("A few words only. " * 40)
    job = desk.submit("name=short", "corpus.name=" + str(desk.folder / "text.txt"), "corpus.validation_documents=0.5")
    assert desk.wait(job, "failed", "finished", "lost", "cancelled") == "failed"
    assert "error: " in desk.ask("logs", job)[0] and not missing.exists()
