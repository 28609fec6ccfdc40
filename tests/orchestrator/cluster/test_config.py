"""Clusters' files: what is read, and the one line that each mistake gets."""

from pathlib import Path

import pytest
from pydantic import TypeAdapter

from orchestrator.cluster.config import Cluster, LocalCluster, SlurmCluster, load_cluster
from qkmodel.errors import InputError

GOOD = {
    "local": "backend: local\n",
    "ray": "backend: ray\naddress: http://head:8265\ntoken_file: ~/token\npackages: [einops]\n",
    "slurm": 'backend: slurm\nnodes: 2\ntime: "2-00:00:00"\nmodules: [cuda/12]\noptions: [--qos=high]\n',
    "kuberay": "backend: kuberay\nimage: r.org/qk:1\nvolume_claim: runs\nworkers: {gpu: 1, most: 4}\n",
}


@pytest.mark.parametrize("kind", GOOD)
def test_a_cluster_is_found_by_name_and_by_file_and_comes_back_from_its_record(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clusters").mkdir()
    (tmp_path / "clusters" / "mine.yaml").write_text(GOOD[kind])
    cluster = load_cluster("mine")
    assert cluster.backend == kind and load_cluster("clusters/mine.yaml") == cluster
    assert TypeAdapter(Cluster).validate_python(cluster.model_dump(mode="json")) == cluster


@pytest.mark.parametrize("time", ["2", "1:01", "0:01:01", "1-0", "0-0:02", "0-0:01:01"])
def test_a_time_limit_that_leaves_more_than_the_grace(time: str, tmp_path: Path) -> None:
    file = tmp_path / "slurm.yaml"
    file.write_text(f"backend: slurm\ntime: '{time}'\n")
    assert load_cluster(str(file)).time == time


@pytest.mark.parametrize("name", ["PGPASSFILE", "AWS_SHARED_CREDENTIALS_FILE", "GOOGLE_APPLICATION_CREDENTIALS"])
def test_where_a_secret_lies_is_none(name: str) -> None:
    assert LocalCluster(environment={name: "/home/me/it"}).environment == {name: "/home/me/it"}


def test_local_needs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_cluster("local") == LocalCluster()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("nodes: 2\n", "backend: must be one of local, ray, slurm, kuberay"),
        ("backend: [slurm]\n", "backend: must be one of local, ray, slurm, kuberay"),
        ("backend: slurm\nnode: 2\n", "node: is no key here; did you mean nodes?"),
        ("backend: slurm\nnodes: 0\n", "nodes: 0 must be at least 1"),
        # YAML reads 8:00:00 as a number
        ("backend: slurm\ntime: 8 h\n", 'time: "8 h" must be a time such as "8:00:00" (hours)'),
        ("backend: slurm\ntime: '1'\n", "time 1 is over before grace_seconds (60)"),
        ("backend: slurm\ntime: '0:59'\ngrace_seconds: 59\n", "time 0:59 is over before grace_seconds (59)"),
        ("backend: slurm\ntime: '0:10:00'\ngrace_seconds: 600\n", "time 0:10:00 is over before grace_seconds (600)"),
        ("", "is empty; a cluster's file is a YAML mapping"),
        ("backend: slurm\noptions: [--nodes=4]\n", "--nodes=4 is what the job's script says itself"),
        ('backend: slurm\noptions: ["--x=1\\n#SBATCH --wrap=id"]\n', "options[0]"),
        ("backend: ray\n", 'address: is missing; write for example address: "http://head:8265"'),
        ("backend: ray\naddress: http://user:password@head:8265\n", "address:"),
        (
            "backend: local\nenvironment: {MLFLOW_TRACKING_PASSWORD: x}\n",
            "environment.MLFLOW_TRACKING_PASSWORD: looks like a secret",
        ),
        ("backend: local\nstorage: ~nobody-here/x\n", "storage: "),
        ("backend: ray\naddress: http://head:99999\n", "has a host or a port that cannot be read"),
        ("backend: ray\naddress: 'http://[::1'\n", "has a host or a port that cannot be read"),
        ("backend: local\nenvironment: {HF_TOKEN: 123456}\n", "environment.HF_TOKEN: looks like a secret"),
        ("backend: local\nenvironment: {MLFLOW_TRACKING_URI: 'http://u:123456@h'}\n", "looks like a secret"),
        ("backend: slurm\noptions: [--array=1-4]\n", "--array=1-4 is what the job's script says itself"),
        ("backend: kuberay\nimage: x\nvolume_claim: y\nworkers: {least: 5, most: 2}\n", "least 5 is more than most 2"),
        ("backend: local\nstorage: ftp://bucket/runs\n", "storage: must be the path of a folder, or s3://"),
        ("backend: local\nenvironment: {A B: x}\n", "A B is no name of an environment variable"),
        ("backend: kuberay\nimage: x\n", "volume_claim: is missing"),
        ("backend: kuberay\nimage: x\nvolume_claim: y\nworkers: {memory: 3 gigs}\n", "workers.memory"),
    ],
)
def test_a_mistake_is_one_line_with_file_key_and_what_would_be_right(tmp_path: Path, text: str, line: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as refused:
        load_cluster(str(file))
    assert str(refused.value).startswith(f"{file}: ") and line in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "password@" not in str(refused.value) and "123456" not in str(refused.value)


def test_an_unknown_name_lists_those_that_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clusters").mkdir()
    (tmp_path / "clusters" / "hpc.yaml").write_text(GOOD["slurm"])
    with pytest.raises(InputError, match=r"--cluster: hcp: there is no clusters/hcp.yaml; known here: hpc, local"):
        load_cluster("hcp")


def test_a_time_in_quotes_is_a_time() -> None:
    assert SlurmCluster(backend="slurm", time="8:00:00").time == "8:00:00"
