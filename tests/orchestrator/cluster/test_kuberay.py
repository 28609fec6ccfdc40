"""Manifests against Kubernetes' schemas, and the backend against a `kubectl` whose answers a script plays.

KubeRay's own schema of a RayJob is used where KUBERAY_CRD names its file
(helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml of a release).
"""

import json
import os
import sys
import threading
from datetime import datetime
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from orchestrator.cli import run
from orchestrator.cluster.config import KubeRayCluster
from orchestrator.cluster.job import Job, JobRecord, new_job
from orchestrator.cluster.kuberay import KubeRayBackend
from orchestrator.cluster.submission import cancel, script_of, status_of, submit
from orchestrator.config import SweepConfig, load_sweep
from qkmodel.errors import InputError
from tests.orchestrator.cluster.kubernetes_schema import complaints
from tests.orchestrator.sweep_files import write_corpus, write_sweep

KUBERNETES = "1.34"
CRD = os.environ.get("KUBERAY_CRD")
CLUSTER = KubeRayCluster.model_validate(
    {
        "backend": "kuberay",
        "image": "registry.example.org/qk-sweep:0.1.0",
        "volume_claim": "runs",
        "environment": {"HF_HOME": "/data/hf"},
        "secrets": ["mlflow"],
        "workers": {"gpu": 1, "least": 0, "most": 8},
    }
)
# keeps RayJobs as files; STATUS is what it says of each
KUBECTL = """#!{python}
import json, os, sys
from pathlib import Path
import yaml
folder = Path({folder!r})
words = [word for word in sys.argv[1:] if not word.startswith("-")]
command = words[1:] if "--namespace" in sys.argv else words
(folder / "calls").open("a").write(" ".join(sys.argv[1:]) + "\\n")
if command[0] == "get" and command[1] == "persistentvolumeclaim":
    if command[2] != "runs":
        sys.exit('Error from server (NotFound): persistentvolumeclaims "%s" not found' % command[2])
elif command[0] == "auth":
    print("no" if (folder / "forbidden").exists() else "yes")
    sys.exit((folder / "forbidden").exists())
elif command[0] == "apply":
    for document in yaml.safe_load_all(sys.stdin):
        if document["kind"] == "RayJob" and (folder / "no_operator").exists():
            sys.exit('error: resource mapping not found for name: "%s"' % document["metadata"]["name"])
        (folder / (document["kind"] + ".json")).write_text(json.dumps(document))
elif command[0] == "get":
    if not (folder / "RayJob.json").exists():
        sys.exit('Error from server (NotFound): rayjobs.ray.io "%s" not found' % command[2])
    print(json.dumps({{"status": json.loads((folder / "status").read_text())}}))
elif command[:2] == ["delete", "rayjob"]:
    sys.exit("error: the server doesn't have a resource type \\"rayjob\\"")
elif command[:2] == ["delete", "configmap"]:
    assert json.loads((folder / "ConfigMap.json").read_text())["metadata"]["name"] == command[2]
    (folder / "ConfigMap.json").unlink()
elif command[0] == "patch":
    (folder / "status").write_text(json.dumps({{"jobDeploymentStatus": "Suspended"}}))
elif command[0] == "logs":
    # one JSON list of status and lines for each call, the last one for ever
    calls = json.loads((folder / "log").read_text()) if (folder / "log").exists() else [[None, "what the sweep says"]]
    status, *lines = calls[0]
    if calls[1:]:
        (folder / "log").write_text(json.dumps(calls[1:]))
    if status is not None:
        (folder / "status").write_text(json.dumps({{"jobDeploymentStatus": status}}))
    if not lines:
        sys.exit("Error from server (BadRequest): container is waiting to start: ContainerCreating")
    print("\\n".join(lines))
"""


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the played cluster keeps its objects; the current folder has `clusters/k.yaml`."""
    folder = tmp_path / "kubernetes"
    folder.mkdir()
    program = folder / "kubectl"
    program.write_text(KUBECTL.format(python=sys.executable, folder=str(folder)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clusters").mkdir()
    values = CLUSTER.model_dump(mode="json", exclude_unset=True)
    (tmp_path / "clusters" / "k.yaml").write_text(yaml.safe_dump(values | {"storage": "/data/runs"}))
    return folder


def sweep() -> SweepConfig:
    """Four packs share a worker's GPU."""
    return load_sweep(Path(__file__).parents[3] / "sweeps" / "l1.yaml", ["resources.pack.gpu=0.25"])


def rayjob() -> dict:
    return KubeRayBackend(CLUSTER).manifests(sweep(), "qk-x")[1]


def test_pods_and_configuration_are_what_kubernetes_takes() -> None:
    configuration, job = KubeRayBackend(CLUSTER).manifests(sweep(), "qk-x")
    kubernetes_validate.validate(configuration, KUBERNETES, strict=True)
    groups = job["spec"]["rayClusterSpec"]
    assert yaml.safe_load(configuration["data"]["sweep.yaml"])["name"] == "l1"
    for template in (groups["headGroupSpec"]["template"], groups["workerGroupSpecs"][0]["template"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}} | template
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        (container,) = pod["spec"]["containers"]
        assert {"name": "HF_HOME", "value": "/data/hf"} in container["env"]
        assert container["envFrom"] == [{"secretRef": {"name": "mlflow"}}]
    volume = Path(__file__).parents[3] / "infra" / "kuberay" / "volume.yaml"
    kubernetes_validate.validate(yaml.safe_load(volume.read_text()), KUBERNETES, strict=True)


@pytest.mark.skipif(CRD is None, reason="KUBERAY_CRD names KubeRay's schema of RayJobs")
def test_the_rayjob_agrees_with_kuberays_schema() -> None:
    versions = yaml.safe_load(Path(CRD).read_text())["spec"]["versions"]
    schema = next(one for one in versions if one["name"] == "v1")["schema"]["openAPIV3Schema"]
    assert complaints(rayjob(), schema) == []
    wrong = rayjob()
    wrong["spec"]["backofLimit"] = 3
    assert complaints(wrong, schema) == ["$.spec.backofLimit: unknown field"]


def test_a_cluster_that_grows_asks_for_nodes_and_one_that_does_not_has_no_autoscaler() -> None:
    head = rayjob()["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert {"name": "ORCHESTRATE_AUTOSCALING", "value": "32"} in head["env"]
    fixed = CLUSTER.model_copy(update={"workers": CLUSTER.workers.model_copy(update={"least": 8})})
    cluster = KubeRayBackend(fixed).manifests(sweep(), "qk-x")[1]["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is False
    assert "ORCHESTRATE_AUTOSCALING" not in json.dumps(cluster)


def test_a_job_from_submission_to_cancellation(kubectl: Path) -> None:
    config = load_sweep(write_sweep(Path.cwd()))
    job = submit(config, "k")
    applied = json.loads((kubectl / "RayJob.json").read_text())
    assert applied["metadata"]["name"] == job.record.handle and job.record.handle.startswith("qk-small-")
    # the sweep file that pods find is the one that was submitted, on the shared volume
    mounted = json.loads((kubectl / "ConfigMap.json").read_text())["data"]["sweep.yaml"]
    Path("mounted.yaml").write_text(mounted)
    assert load_sweep(Path("mounted.yaml")) == config.model_copy(update={"storage": "/data/runs"})
    backend = KubeRayBackend(job.record.cluster)
    for said, state in [
        ({}, "pending"),
        ({"jobDeploymentStatus": "Initializing"}, "pending"),
        ({"jobDeploymentStatus": "Running"}, "running"),
        ({"jobDeploymentStatus": "Retrying"}, "pending"),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, "finished"),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, "interrupted"),
        ({"jobDeploymentStatus": "Failed", "message": "it did\nnot work"}, "failed"),
        ({"jobDeploymentStatus": "Suspended"}, "interrupted"),
        ({"jobDeploymentStatus": "SomethingNew"}, "unknown"),
    ]:
        (kubectl / "status").write_text(json.dumps(said))
        assert backend.status(job).state == state
    (kubectl / "status").write_text(json.dumps({"jobDeploymentStatus": "Running"}))
    assert list(backend.logs(job, follow=False)) == ["what the sweep says\n"]
    cancel(job)
    assert status_of(job).state == "cancelled"
    (kubectl / "RayJob.json").unlink()
    assert status_of(job).state == "cancelled"


def test_following_waits_for_the_cluster_and_goes_on_where_kuberay_begins_again(
    kubectl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.cluster.kuberay.POLL_SECONDS", 0.01)
    job = submit(load_sweep(write_sweep(Path.cwd())), "k")
    backend = KubeRayBackend(job.record.cluster)
    (kubectl / "status").write_text(json.dumps({"jobDeploymentStatus": "Running"}))
    again = json.dumps({"jobDeploymentStatus": "Running"})
    calls = [["Running"], ["Running", "one"], ["Retrying", "one", "two"], ["Running", "three"], ["Complete", "three"]]
    (kubectl / "log").write_text(json.dumps([*calls, [None, "three", "four"]]))
    said = []
    for line in backend.logs(job, follow=True):
        said.append(line.strip())
        if said[-1] == "two":
            (kubectl / "status").write_text(json.dumps({"jobDeploymentStatus": "Retrying"}))
            threading.Timer(0.5, (kubectl / "status").write_text, (again,)).start()
    assert said == ["one", "two", "three", "four"]


def test_following_says_that_kubectl_is_not_there(kubectl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = submit(load_sweep(write_sweep(Path.cwd())), "k")
    monkeypatch.setenv("PATH", "/nowhere")
    assert run(["logs", "--follow", job.id]) == 2


@pytest.mark.parametrize(
    ("sweep", "cluster", "line"),
    [
        ({}, {"storage": "/elsewhere"}, "storage: /elsewhere is not on the shared volume; write a folder below /data"),
        ({"tracking": "http://user:password@host:5000"}, {}, "tracking: holds a password"),
        ({"resources": {"pack": {"cpu": 8}}}, {}, "a worker of the cluster, cpu 4 and gpu 1, is too small for a pack"),
        ({}, {"volume_claim": "other"}, 'kubectl: Error from server (NotFound): persistentvolumeclaims "other"'),
        ({}, {"namespace": "forbidden"}, "namespace: you may not create RayJobs in forbidden"),
    ],
)
def test_what_would_fail_there_is_one_line_before_anything_is_made(
    kubectl: Path, sweep: dict, cluster: dict, line: str
) -> None:
    if cluster.get("namespace") == "forbidden":
        (kubectl / "forbidden").touch()
    file = Path("clusters/k.yaml")
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | cluster))
    with pytest.raises(InputError) as refused:
        submit(load_sweep(write_sweep(Path.cwd(), **sweep)), "k")
    assert line in str(refused.value) and "\n" not in str(refused.value) and "password@" not in str(refused.value)
    assert not (kubectl / "RayJob.json").exists() and not Path("runs/jobs").exists()


def test_where_kubernetes_refuses_the_rayjob_nothing_is_left(kubectl: Path) -> None:
    (kubectl / "no_operator").touch()
    with pytest.raises(InputError, match="kubectl: error: resource mapping not found"):
        submit(load_sweep(write_sweep(Path.cwd())), "k")
    assert not (kubectl / "ConfigMap.json").exists() and list(Path("runs/jobs").iterdir()) == []


def test_what_kubectl_logs_of_its_attempts_is_no_part_of_the_line(kubectl: Path) -> None:
    noise = 'E1126 18:45:13.473378   18616 memcache.go:265] "Unhandled Error" err="connection refused"'
    line = "The connection to the server localhost:8080 was refused - did you specify the right host or port?"
    (kubectl / "said").write_text(f"{noise}\n{noise}\n{line}\n")
    (kubectl / "kubectl").write_text(f"#!/bin/sh\ncat {kubectl}/said >&2\nexit 1\n")
    with pytest.raises(InputError) as refused:
        submit(load_sweep(write_sweep(Path.cwd())), "k")
    assert str(refused.value) == f"kubectl: {line}"


def test_without_kubectl_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    record = JobRecord(
        sweep="x",
        cluster_name="k",
        cluster=CLUSTER,
        storage="/data/runs",
        working_directory="/",
        submitted=datetime.now().astimezone(),
        handle="qk-x",
    )
    with pytest.raises(InputError, match="kubectl: is not installed here"):
        status_of(Job(tmp_path, record))


def test_a_dry_run_shows_the_manifests_with_the_sweep_in_them(kubectl: Path) -> None:
    configuration, job = yaml.safe_load_all(script_of(load_sweep(write_sweep(Path.cwd())), "k"))
    assert yaml.safe_load(configuration["data"]["sweep.yaml"])["name"] == "small" and job["kind"] == "RayJob"
    assert not Path("runs").exists() and not (kubectl / "calls").exists()


def test_a_dry_run_shows_no_password(kubectl: Path) -> None:
    config = load_sweep(write_sweep(Path.cwd(), tracking="http://user:hunter2@host:5000"))
    with pytest.raises(InputError, match="tracking: holds a password"):
        script_of(config, "k")


def test_a_dry_run_of_what_this_machine_does_not_have(kubectl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_sweep(Path.cwd(), corpus={"name": str(write_corpus(Path.cwd())), "bos": None, "context": 16})
    gpus = ("resources.pack.gpu=0.5", "resources.activations.gpu=1")
    assert run(["submit", str(file), "--cluster", "k", "--dry-run", *gpus]) == 0
    assert "no GPU to measure trainings on" in capsys.readouterr().out


def test_a_job_folder_remembers_the_cluster_as_it_was(kubectl: Path) -> None:
    job = new_job(load_sweep(write_sweep(Path.cwd())), "k", CLUSTER)
    assert JobRecord.model_validate_json((job.folder / "job.json").read_text()).cluster == CLUSTER
