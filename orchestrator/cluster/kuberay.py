"""Jobs of a Kubernetes cluster with the KubeRay operator: a RayJob, which brings a Ray cluster up and down again.

KubeRay may build the Ray cluster anew (`backoffLimit`): the sweep then goes on from its ledger, on the shared volume.
"""

import contextlib
import itertools
import json
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import yaml

from orchestrator.addresses import redact_url
from orchestrator.cluster.backend import NoAnswer, refuse_relative_tracking
from orchestrator.cluster.config import KubeRayCluster, NodeShape
from orchestrator.cluster.job import ON_ITS_WAY, SWEEP, Job, JobStatus, State, resolved_yaml
from orchestrator.cluster.log_file import HICCUP_SECONDS
from orchestrator.config import SweepConfig, load_sweep
from orchestrator.plan_figures import packs_at_once
from orchestrator.storage.address import is_bucket
from qkmodel.errors import InputError

# with what it takes to start, less than 15
ANSWER_SECONDS = 10.0
POLL_SECONDS = 2.0
FOLDER = "/etc/qk-sweep"
# Packs write checkpoints within ten seconds of the end.
END_SECONDS = 30
# Ray's object store holds nothing of ours: what is large is memory-mapped from files.
_OBJECT_STORE = "100000000"
# infra/container/Dockerfile
_IMAGE_USER = 1000
_LOGGED = re.compile(r"[IWEF]\d{4} ")
# ray-operator/apis/ray/v1/rayjob_types.go
_STATES: dict[str, State] = {
    "": "pending",
    "Initializing": "pending",
    "Waiting": "pending",
    "Retrying": "pending",
    "Suspending": "running",
    "Running": "running",
    "Complete": "finished",
    "Failed": "failed",
    "ValidationFailed": "failed",
}


class KubeRayBackend:
    """See `Backend`."""

    def __init__(self, cluster: KubeRayCluster) -> None:
        self._cluster = cluster

    def check(self, config: SweepConfig) -> None:
        mount = self._cluster.mount
        if not is_bucket(config.storage) and not config.storage.startswith(f"{mount}/"):
            raise InputError(
                f"storage: {config.storage} is not on the shared volume; write a folder below {mount}, in the sweep "
                "file or in the cluster's"
            )
        refuse_relative_tracking(config)
        _refuse_password(config)
        workers, pack = self._cluster.workers, config.resources.pack
        if packs_at_once(workers.cpu, workers.gpu, pack) == 0:
            raise InputError(
                f"resources.pack: a worker of the cluster, cpu {workers.cpu:g} and gpu {workers.gpu}, is too small for "
                f"a pack with cpu {pack.cpu:g} and gpu {pack.gpu:g}; ask for less, or for larger workers"
            )
        self._ask("get", "persistentvolumeclaim", self._cluster.volume_claim, "--output=name")
        if self._ask("auth", "can-i", "create", "rayjobs.ray.io").strip() != "yes":
            raise InputError(f"namespace: you may not create RayJobs in {self._cluster.namespace}")

    def script(self, job: Job, config: SweepConfig) -> str:
        _refuse_password(config)
        return _as_yaml(self.manifests(config, job.record.handle))

    def submit(self, job: Job) -> None:
        text = _as_yaml(self.manifests(load_sweep(job.sweep_file), job.record.handle))
        try:
            self._ask("apply", "--filename=-", text=text)
        except NoAnswer:
            raise
        except InputError:
            # without an operator that knows the RayJob, or with a quota, only the ConfigMap is made
            for kind in ("rayjob", "configmap"):
                with contextlib.suppress(InputError):
                    self._ask("delete", kind, job.record.handle, "--ignore-not-found")
            raise

    def status(self, job: Job) -> JobStatus:
        answer = self._ask("get", "rayjob", job.record.handle, "--output=json", gone="NotFound")
        if not answer:
            return job.unless_cancelled(JobStatus(state="lost", detail="Kubernetes no longer knows it"))
        status = json.loads(answer).get("status") or {}
        deployment, detail = status.get("jobDeploymentStatus") or "", f"RayJob {job.record.handle}"
        # a stopped Ray job counts as complete there
        if deployment == "Suspended" or (deployment == "Complete" and status.get("jobStatus") == "STOPPED"):
            return job.unless_cancelled(JobStatus(state="interrupted", detail=f"{detail} was stopped"))
        state = _STATES.get(deployment, "unknown")
        if state == "failed":
            said = " ".join(str(status.get("message") or status.get("reason") or "").split())
            return JobStatus(state=state, detail=said or detail)
        return JobStatus(state=state, detail="" if state == "finished" else f"{detail}, {deployment or 'new'}")

    def logs(self, job: Job, follow: bool) -> Iterator[str]:
        said, state = 0, self.status(job).state
        patience = time.monotonic() + HICCUP_SECONDS
        while True:
            try:
                if follow and state == "pending":
                    # the log comes once the Ray cluster is up; when KubeRay begins again, from its beginning
                    said = 0
                else:
                    for line in itertools.islice(self._printed(job, follow), said, None):
                        yield line
                        said, patience = said + 1, time.monotonic() + HICCUP_SECONDS
                    if not follow or state not in ON_ITS_WAY:
                        return
                time.sleep(POLL_SECONDS)
                state, patience = self.status(job).state, time.monotonic() + HICCUP_SECONDS
            except InputError:
                if not follow or state not in ON_ITS_WAY or time.monotonic() > patience:
                    raise
                time.sleep(POLL_SECONDS)

    def _printed(self, job: Job, follow: bool) -> Iterator[str]:
        # KubeRay's submitter, a Kubernetes job of the same name, prints what the sweep prints
        command = self._command("logs", f"job/{job.record.handle}", *(["--follow"] if follow else []))
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            yield from process.stdout
            complaint = process.stderr.read()
        if process.returncode != 0:
            raise InputError(f"kubectl: {_complaint(complaint)}")

    def cancel(self, job: Job) -> None:
        self._ask("patch", "rayjob", job.record.handle, "--type=merge", "--patch", '{"spec": {"suspend": true}}')

    def manifests(self, config: SweepConfig, name: str) -> list[dict[str, Any]]:
        """The sweep file as a ConfigMap, and the RayJob that runs it."""
        # takes torch, for which nobody who asks for a job should wait
        from orchestrator.plan_checks import AUTOSCALING

        cluster = self._cluster
        packs = cluster.workers.most * packs_at_once(cluster.workers.cpu, cluster.workers.gpu, config.resources.pack)
        scaling = cluster.workers.least < cluster.workers.most
        metadata = {"name": name, "namespace": cluster.namespace, "labels": {"app.kubernetes.io/part-of": "qk-sweep"}}
        workers = {
            "groupName": "packs",
            "replicas": cluster.workers.least,
            "minReplicas": cluster.workers.least,
            "maxReplicas": cluster.workers.most,
            "rayStartParams": {"object-store-memory": _OBJECT_STORE},
            "template": self._pod("ray-worker", cluster.workers, name, {}),
        }
        head = {
            # packs train on workers; the head drives, and fills the activation cache
            "rayStartParams": {"num-cpus": "0", "object-store-memory": _OBJECT_STORE},
            "template": self._pod("ray-head", cluster.head, name, {AUTOSCALING: str(packs)} if scaling else {}),
        }
        spec = {
            "entrypoint": f"env -u OMP_NUM_THREADS python -m orchestrator sweep {FOLDER}/{SWEEP}",
            "backoffLimit": cluster.retries,
            "shutdownAfterJobFinishes": True,
            "rayClusterSpec": {
                "rayVersion": version("ray"),
                "enableInTreeAutoscaling": scaling,
                "authOptions": {"mode": "token"},
                "headGroupSpec": head,
                "workerGroupSpecs": [workers],
            },
        }
        return [
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {SWEEP: resolved_yaml(config)}},
            {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec},
        ]

    def _pod(self, container: str, shape: NodeShape, name: str, own: Mapping[str, str]) -> dict[str, Any]:
        cluster = self._cluster
        environment = cluster.environment | own
        reserved: dict[str, Any] = {"cpu": f"{shape.cpu:g}", "memory": shape.memory}
        if shape.gpu:
            reserved["nvidia.com/gpu"] = shape.gpu
        return {
            "spec": {
                "terminationGracePeriodSeconds": END_SECONDS,
                # a new volume belongs to root; looking through a full one at each start would take long
                "securityContext": {"fsGroup": _IMAGE_USER, "fsGroupChangePolicy": "OnRootMismatch"},
                "containers": [
                    {
                        "name": container,
                        "image": cluster.image,
                        "resources": {"requests": reserved, "limits": reserved},
                        "env": [{"name": key, "value": value} for key, value in environment.items()],
                        "envFrom": [{"secretRef": {"name": secret}} for secret in cluster.secrets],
                        "volumeMounts": [
                            {"name": "runs", "mountPath": cluster.mount},
                            {"name": "sweep", "mountPath": FOLDER, "readOnly": True},
                        ],
                    }
                ],
                "volumes": [
                    {"name": "runs", "persistentVolumeClaim": {"claimName": cluster.volume_claim}},
                    {"name": "sweep", "configMap": {"name": name}},
                ],
            }
        }

    def _command(self, *arguments: str) -> list[str]:
        context = ["--context", self._cluster.context] if self._cluster.context is not None else []
        return ["kubectl", *context, "--namespace", self._cluster.namespace, *arguments]

    def _ask(self, *arguments: str, text: str | None = None, gone: str | None = None) -> str:
        """What kubectl answers; empty where it complains with the word `gone`. Raises InputError."""
        try:
            ran = subprocess.run(
                self._command(*arguments), input=text, capture_output=True, text=True, timeout=ANSWER_SECONDS
            )
        except FileNotFoundError:
            raise InputError("kubectl: is not installed here; it is what this backend asks the cluster with") from None
        except subprocess.TimeoutExpired:
            raise NoAnswer(f"kubectl: the cluster did not answer within {ANSWER_SECONDS:.0f} s") from None
        # `auth can-i` says no with an exit code
        if ran.returncode != 0 and ran.stdout.strip() != "no":
            complaint = _complaint(ran.stderr) or f"exit code {ran.returncode}"
            if gone is not None and gone in complaint:
                return ""
            raise InputError(f"kubectl: {complaint}")
        return ran.stdout


def _complaint(said: str) -> str:
    """What kubectl has to say, in one line: without what it logs of each of its attempts, if it says more than that."""
    lines = said.splitlines()
    return " ".join(" ".join([line for line in lines if not _LOGGED.match(line)] or lines).split())


def _refuse_password(config: SweepConfig) -> None:
    if config.tracking is not None and redact_url(config.tracking) != config.tracking:
        raise InputError(
            "tracking: holds a password, which would lie in the cluster for all to read; leave it out and name a "
            "Kubernetes secret with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD under the cluster's secrets"
        )


class _Plain(yaml.SafeDumper):
    """Without anchors, and with the sweep file as lines: it is read by people."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Plain.add_representer(str, _Plain.represent_str)


def _as_yaml(documents: list[dict[str, Any]]) -> str:
    return yaml.dump_all(documents, Dumper=_Plain, sort_keys=False)
