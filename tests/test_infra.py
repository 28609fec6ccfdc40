"""The files for clusters: they are what the program hands over, and what their readers take."""

import json
import re
import sys
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from orchestrator.cluster.config import load_cluster
from orchestrator.cluster.submission import script_of
from orchestrator.config import load_sweep

ROOT = Path(__file__).parents[1]
CLUSTERS = sorted((ROOT / "clusters").glob("*.yaml"))


@pytest.mark.parametrize("file", CLUSTERS, ids=lambda file: file.stem)
def test_every_packaged_cluster_is_read(file: Path) -> None:
    assert load_cluster(str(file)).backend == file.stem


@pytest.mark.parametrize(("cluster", "file"), [("kuberay", "kuberay/rayjob.yaml"), ("slurm", "slurm/l1.sbatch")])
def test_an_example_is_what_a_dry_run_shows(cluster: str, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    shown = script_of(load_sweep(Path("sweeps/l1.yaml")), cluster).replace(sys.executable, "python")
    assert (ROOT / "infra" / file).read_text() == shown


def test_the_launchers_file_is_one_that_ray_takes() -> None:
    written = yaml.safe_load((ROOT / "infra" / "ray" / "aws.yaml").read_text())
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(written, json.loads(schema.read_text()))
    validate_config(prepare_config(written))


def test_images_and_packages_are_pinned_and_no_file_holds_a_secret() -> None:
    compose = yaml.safe_load((ROOT / "infra" / "compose" / "compose.yaml").read_text())
    for service in compose["services"].values():
        assert "build" in service or (":" in service["image"] and not service["image"].endswith(":latest"))
        for name, value in service.get("environment", {}).items():
            if "PASSWORD" in name or "SECRET" in name:
                assert value.startswith("${") and ":?" in value
    for file in (ROOT / "infra").rglob("*Dockerfile"):
        (base,) = [line for line in file.read_text().splitlines() if line.startswith("FROM ")]
        assert ":" in base and not base.endswith(":latest")
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    installed = re.findall(
        r"([\w-]+)(?:\[\w+\])?==([\w.]+)", (ROOT / "infra" / "compose" / "mlflow.Dockerfile").read_text()
    )
    assert {"mlflow", "psycopg2-binary", "boto3"} == {name for name, _ in installed}
    assert all(pinned.get(name, version) == version for name, version in installed)
