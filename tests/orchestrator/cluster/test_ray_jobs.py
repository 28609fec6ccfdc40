"""What is handed to Ray's Jobs API, and what its answers mean, with a client that a script plays."""

import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from ray.job_submission import JobStatus as RayStatus

from orchestrator.cluster.config import RayCluster
from orchestrator.cluster.job import all_jobs, new_job
from orchestrator.cluster.ray_jobs import RayBackend
from orchestrator.cluster.submission import submit
from orchestrator.config import load_sweep
from qkmodel.errors import InputError
from tests.orchestrator.sweep_files import write_sweep


class Client:
    """A cluster whose jobs end at once, with what `said` says and what `details` are."""

    def __init__(self, said: str = "", **details: Any) -> None:
        self.said = said
        self.details = SimpleNamespace(**{"status": RayStatus.SUCCEEDED, "message": None} | details)
        self.submitted: list[dict[str, Any]] = []

    def submit_job(self, **job: Any) -> str:
        self.submitted.append(job)
        return "raysubmit_1"

    def get_job_info(self, name: str) -> SimpleNamespace:
        return self.details

    def get_job_logs(self, name: str) -> str:
        return self.said


def backend(monkeypatch: pytest.MonkeyPatch, client: Client, **keys: Any) -> RayBackend:
    cluster = RayCluster.model_validate({"backend": "ray", "address": "http://head:8265"} | keys)
    monkeypatch.setattr(RayBackend, "_client", lambda self: client)
    return RayBackend(cluster)


def test_the_look_beforehand_has_the_environment_that_the_sweep_will_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client()
    backend(monkeypatch, client, environment={"AWS_PROFILE": "mine"}).check(load_sweep(write_sweep(tmp_path)))
    (look,) = client.submitted
    assert look["runtime_env"]["env_vars"] == {"AWS_PROFILE": "mine"}


def test_what_the_nodes_lack_is_refused_unless_the_cluster_is_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_sweep(write_sweep(tmp_path))
    client = Client("No module named 'optuna'\n", status=RayStatus.FAILED)
    with pytest.raises(InputError, match="python: python on the cluster's head does not have this program"):
        backend(monkeypatch, client).check(config)
    backend(monkeypatch, client, packages=["optuna"]).check(config)


def test_a_sweep_file_of_the_same_name_in_the_working_directory_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own.yaml"
    own.write_text("mine")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "sweep.yaml").symlink_to(own)
    client = Client()
    ray = backend(monkeypatch, client, working_directory=str(tmp_path / "work"))
    job = new_job(load_sweep(write_sweep(tmp_path)), "ray", RayCluster(backend="ray", address="http://head:8265"))
    with ray._upload(job) as folder:
        assert (folder / "sweep.yaml").read_bytes() == job.sweep_file.read_bytes()
    assert own.read_text() == "mine"


@pytest.mark.parametrize(
    ("code", "state"), [(143, "interrupted"), (-15, "interrupted"), (-9, "failed"), (0, "finished")]
)
def test_a_driver_that_a_signal_ended(code: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = new_job(load_sweep(write_sweep(tmp_path)), "ray", RayCluster(backend="ray", address="http://head:8265"))
    client = Client(status=RayStatus.FAILED, driver_exit_code=code)
    assert backend(monkeypatch, client).status(job).state == state


def test_a_job_whose_submission_breaks_off_is_kept_since_it_may_have_arrived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ray.yaml").write_text("backend: ray\naddress: http://head:8265\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: server.accept()[0].close(), daemon=True).start()

        class Breaking(Client):
            def submit_job(self, **job: Any) -> str:
                return requests.post(f"http://127.0.0.1:{server.getsockname()[1]}", timeout=5).text

        monkeypatch.setattr(RayBackend, "check", lambda self, config: None)
        monkeypatch.setattr(RayBackend, "_client", lambda self: Breaking())
        with pytest.raises(InputError, match="the connection broke before the cluster answered"):
            submit(load_sweep(write_sweep(tmp_path)), "ray.yaml")
    assert [job.id for job in all_jobs()[0]] == ["small-1"]
