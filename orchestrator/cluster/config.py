"""A cluster's file: which backend takes its jobs, and what that has to know."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from orchestrator.addresses import redact_url, require_readable
from orchestrator.storage.address import check_storage_text
from orchestrator.validation import explain
from orchestrator.yaml_file import read_mapping
from qkmodel.configs import Number, Text, WholeNumber
from qkmodel.errors import InputError
from qkmodel.schema import Schema

FOLDER = Path("clusters")
LOCAL = "local"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_SECRET = re.compile(r"PASS|PWD|TOKEN$|SECRET|CREDENTIAL|_PAT$|KEY$", re.IGNORECASE)
# AWS_SHARED_CREDENTIALS_FILE, PGPASSFILE: where a secret is, which is none
_PLACE = re.compile(r"(FILE|PATH|DIR)$|^GOOGLE_APPLICATION_CREDENTIALS$", re.IGNORECASE)
_TIME = re.compile(r"(\d+-)?\d+(:\d\d){0,2}", re.ASCII)
# what the batch script says itself
_OWN_OPTIONS = (
    "job-name",
    "output",
    "error",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "requeue",
    "no-requeue",
    "signal",
    "array",
    "wait",
    "test-only",
    "clusters",
    "open-mode",
    "partition",
    "account",
    "time",
    "gpus-per-node",
    "cpus-per-task",
    "mem",
    "chdir",
    "parsable",
    "wrap",
)


class _Cluster(Schema):
    """What every cluster may say.

    `storage` takes the place of the sweep file's; `environment` is set for the sweep and its workers.
    """

    storage: Text | None = None
    environment: dict[str, str] = Field(default={})

    @field_validator("storage")
    @classmethod
    def _folder(cls, storage: str | None) -> str | None:
        if storage is not None:
            check_storage_text(storage)
        return storage

    @field_validator("environment", mode="before")
    @classmethod
    def _variables(cls, environment: object) -> object:
        # before, so that no complaint about a value shows it
        for name, value in environment.items() if isinstance(environment, dict) else ():
            if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
                raise ValueError(f"{name} is no name of an environment variable")
            is_secret = _SECRET.search(name) and not _PLACE.search(name)
            if is_secret or redact_url(str(value)) != str(value):
                raise InputError(
                    f"environment.{name}: looks like a secret, which would lie in files; have the cluster set it "
                    "(a file only you can read, or a Kubernetes secret), or name a file that holds it"
                )
        return environment


def _slurm_seconds(time: str) -> int:
    """Of minutes, minutes:seconds, hours:minutes:seconds, and days-hours with what follows (man sbatch)."""
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = parts if len(parts) == 3 else [0, *parts, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


class LocalCluster(_Cluster):
    """This machine, in the background."""

    backend: Literal["local"] = "local"


class RayCluster(_Cluster):
    """A running Ray cluster, through its Jobs API.

    `address` is that of the dashboard; `token_file` holds the token of a cluster that asks for one;
    `python` is the interpreter there that has this program; `working_directory` is uploaded and is where the sweep
    runs; `packages` are pip requirements that the nodes lack.
    """

    backend: Literal["ray"]
    address: Annotated[str, Field(pattern=r"^https?://[^\s/@]+/?$", examples=["http://head:8265"])]
    token_file: Text | None = None
    python: Text = "python"
    working_directory: Text | None = None
    packages: tuple[Text, ...] = ()

    @field_validator("address")
    @classmethod
    def _readable(cls, address: str) -> str:
        try:
            require_readable(address)
        except InputError:
            raise ValueError("has a host or a port that cannot be read") from None
        return address


class SlurmCluster(_Cluster):
    """A SLURM cluster, through `sbatch` on this machine.

    `setup` are shell lines run on the first node before the sweep; `options` further options of sbatch, as on its
    command line; `grace_seconds` before the time limit the job is told to end, so that it continues in another.
    """

    backend: Literal["slurm"]
    nodes: Annotated[WholeNumber, Field(ge=1)] = 1
    partition: Text | None = None
    account: Text | None = None
    time: Text | None = Field(default=None, examples=["8:00:00"])
    gpus_per_node: Annotated[WholeNumber, Field(ge=0)] = 0
    cpus_per_node: Annotated[WholeNumber, Field(ge=1)] = 1
    memory_per_node: Annotated[str, Field(pattern=r"^\d+[KMGT]?$", examples=["64G"])] | None = None
    modules: tuple[Text, ...] = ()
    setup: tuple[Text, ...] = ()
    options: tuple[Annotated[str, Field(pattern=r"^--[a-z][a-z-]*(=\S+)?$", examples=["--qos=high"])], ...] = ()
    grace_seconds: Annotated[WholeNumber, Field(ge=20, le=3600)] = 60
    port: Annotated[WholeNumber, Field(ge=1024, le=65535)] = 6379

    @field_validator("time")
    @classmethod
    def _duration(cls, time: str | None) -> str | None:
        if time is not None and not _TIME.fullmatch(time):
            raise ValueError('must be a time such as "8:00:00" (hours) or "2-00:00:00" (days), in quotes')
        return time

    @model_validator(mode="after")
    def _time_to_train(self) -> Self:
        if self.time is not None and _slurm_seconds(self.time) <= self.grace_seconds:
            raise ValueError(f"time {self.time} is over before grace_seconds ({self.grace_seconds}); ask for more")
        return self

    @field_validator("options")
    @classmethod
    def _not_ours(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            if option.removeprefix("--").partition("=")[0] in _OWN_OPTIONS:
                raise ValueError(f"{option} is what the job's script says itself; use the key for it, if there is one")
        return options


class NodeShape(Schema):
    """What Kubernetes reserves for a pod."""

    cpu: Number = Field(default=4, gt=0)
    memory: Annotated[str, Field(pattern=r"^\d+(Mi|Gi|Ti)$", examples=["16Gi"])] = "16Gi"
    gpu: Annotated[WholeNumber, Field(ge=0)] = 0


class WorkerGroup(NodeShape):
    """Workers of one kind; Ray's autoscaler has between `least` and `most` of them."""

    least: Annotated[WholeNumber, Field(ge=0)] = 0
    most: Annotated[WholeNumber, Field(ge=1)] = 1


class KubeRayCluster(_Cluster):
    """A Kubernetes cluster with the KubeRay operator, through `kubectl` on this machine.

    `volume_claim` is a volume that all pods can write, mounted at `mount`; `secrets` name Kubernetes secrets whose
    entries become environment variables; `retries` how often KubeRay may begin again on a new Ray cluster.
    """

    backend: Literal["kuberay"]
    image: Text = Field(examples=["registry.example.org/qk-sweep:0.1.0"])
    volume_claim: Text
    mount: Annotated[str, Field(pattern=r"^/[\w./-]+$")] = "/data"
    namespace: Text = "default"
    context: Text | None = None
    head: NodeShape = NodeShape()
    workers: WorkerGroup = WorkerGroup()
    secrets: tuple[Text, ...] = ()
    retries: Annotated[WholeNumber, Field(ge=0)] = 3

    @field_validator("mount")
    @classmethod
    def _without_a_last_slash(cls, mount: str) -> str:
        return mount.rstrip("/")

    @field_validator("workers")
    @classmethod
    def _no_more_than_most(cls, workers: WorkerGroup) -> WorkerGroup:
        if workers.least > workers.most:
            raise ValueError(f"least {workers.least} is more than most {workers.most}")
        return workers


Cluster = Annotated[LocalCluster | RayCluster | SlurmCluster | KubeRayCluster, Field(discriminator="backend")]
_KINDS = {"local": LocalCluster, "ray": RayCluster, "slurm": SlurmCluster, "kuberay": KubeRayCluster}


def load_cluster(name: str) -> Cluster:
    """The cluster of a file, or of a name for `clusters/NAME.yaml`; `local` needs no file.

    Raises InputError in one line.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name}.yaml"
        if not path.exists():
            if name == LOCAL:
                return LocalCluster()
            known = sorted({LOCAL, *(file.stem for file in FOLDER.glob("*.yaml"))})
            raise InputError(f"--cluster: {name}: there is no {path}; known here: {', '.join(known)}")
    values = read_mapping(path, "cluster's file")
    kind = values.get("backend")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise InputError(f"{path}: backend: must be one of {', '.join(_KINDS)}")
    try:
        return _KINDS[kind].model_validate(values)
    except ValidationError as error:
        raise InputError(redact_url(f"{path}: {explain(error, values, _KINDS[kind])}")) from None
