"""What every backend can do, and which one a cluster's file asks for."""

from collections.abc import Iterator
from typing import Protocol

from orchestrator.addresses import sqlite_file
from orchestrator.cluster.config import Cluster, KubeRayCluster, LocalCluster, RayCluster, SlurmCluster
from orchestrator.cluster.job import Job, JobStatus
from orchestrator.config import SweepConfig
from qkmodel.errors import InputError


class NoAnswer(InputError):
    """A cluster did not answer in time; what it was told may have reached it."""


def refuse_relative_tracking(config: SweepConfig) -> None:
    """Raises InputError for an MLflow database whose path is relative to a folder that ends with the job."""
    file = sqlite_file(config.tracking or "")
    if file is not None and not file.is_absolute():
        raise InputError(
            f"tracking: {config.tracking} is relative, and the sweep runs elsewhere; write a whole path (four slashes) "
            "on what all nodes share, a server, or leave it out"
        )


class Backend(Protocol):
    """Where jobs go. Everything raises InputError, in one line and within 15 s, when the cluster cannot be asked."""

    def check(self, config: SweepConfig) -> None:
        """Refuses what would fail on the cluster, before anything is made there."""

    def script(self, job: Job, config: SweepConfig) -> str:
        """What is handed over, for a person to read."""

    def submit(self, job: Job) -> None:
        """Hands the job over under its handle. Raises NoAnswer where it may have arrived all the same."""

    def status(self, job: Job) -> JobStatus:
        """Where it is. A job of which nobody knows any more is `lost`."""

    def logs(self, job: Job, follow: bool) -> Iterator[str]:
        """What the sweep has said, in pieces; with `follow` until it is over."""

    def cancel(self, job: Job) -> None:
        """Has it end, with checkpoints; returns once it is over or was asked to."""


def backend_of(cluster: Cluster) -> Backend:
    """The backend of a cluster."""
    match cluster:
        case LocalCluster():
            from orchestrator.cluster.local import LocalBackend

            return LocalBackend(cluster)
        case SlurmCluster():
            from orchestrator.cluster.slurm import SlurmBackend

            return SlurmBackend(cluster)
        case RayCluster():
            from orchestrator.cluster.ray_jobs import RayBackend

            return RayBackend(cluster)
        case KubeRayCluster():
            from orchestrator.cluster.kuberay import KubeRayBackend

            return KubeRayBackend(cluster)
