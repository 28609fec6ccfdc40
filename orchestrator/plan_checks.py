"""What a sweep file asks of this machine, its storage, its packages and its model, and cannot have."""

import os
import socket
from pathlib import Path

import torch
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from orchestrator.addresses import redact_url
from orchestrator.config import SweepConfig
from orchestrator.tracking_store import tracking_address
from qkmodel.errors import InputError
from qkmodel.model_description import ModelDescription

# set, it names the cluster that packs run on
RAY_ADDRESS = "RAY_ADDRESS"
# on the head of a cluster whose nodes come when they are asked for: how many packs it may grow to
AUTOSCALING = "ORCHESTRATE_AUTOSCALING"
ANSWER_SECONDS = 10.0
GREETING_SECONDS = 5.0
# with which HTTP/2, and so gRPC, begins from either side
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
_SETTINGS = b"\4"


def machine_cpus() -> int:
    """CPUs that this process may use."""
    # macOS has no affinity
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_gpus() -> int:
    """GPUs that this process sees."""
    return torch.cuda.device_count()


def check_model(config: SweepConfig, model: ModelDescription) -> None:
    """Refuses layers and contexts that the model does not have, and trainings shorter than a batch of such contexts."""
    for layer in config.layers:
        if layer >= model.n_layers:
            raise InputError(
                f"layers: {layer} is out of range; {config.model.name} has layers 0 to {model.n_layers - 1}"
            )
    if config.corpus.context > model.max_context:
        raise InputError(
            f"corpus.context: {config.corpus.context} is more than {config.model.name} can read; "
            f"at most {model.max_context}"
        )
    training, batch_tokens = config.training, config.training.batch_sequences * config.corpus.context
    if training.tokens < batch_tokens:
        raise InputError(
            f"training.tokens: {training.tokens} is less than one batch; raise it to {batch_tokens} or more, or lower "
            f"training.batch_sequences ({training.batch_sequences}) or corpus.context ({config.corpus.context})"
        )


def check_resources(config: SweepConfig) -> None:
    """Refuses more CPUs or GPUs than there are; what packs find on a cluster is known there only."""
    wanted_here = [("activations", config.resources.activations)]
    if not os.environ.get(RAY_ADDRESS):
        wanted_here.insert(0, ("pack", config.resources.pack))
    for key, wanted in wanted_here:
        for kind, count, there in (("cpu", wanted.cpu, machine_cpus()), ("gpu", wanted.gpu, machine_gpus())):
            if count is not None and count > there:
                raise InputError(f"resources.{key}.{kind}: {count:g} is more than this machine has; at most {there}")


def check_tracking(tracking: str | None, storage: Path) -> None:
    """Refuses a database that no installed package can talk to: it would be found out when all is trained."""
    address, _ = tracking_address(tracking, storage)
    if address.startswith("http"):
        return
    try:
        make_url(address).get_dialect().import_dbapi()
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        reason = redact_url(str(error).splitlines()[0])
        raise InputError(
            f"tracking: {redact_url(address)} needs a database driver that is not installed ({reason}); "
            "install it, or write sqlite:///FILE.db or http://HOST:PORT"
        ) from error


def check_cluster() -> None:
    """Refuses a `RAY_ADDRESS` at which nobody answers, or somebody else: Ray would wait minutes for either."""
    address = os.environ.get(RAY_ADDRESS)
    if not address:
        return
    host, _, port = address.rpartition(":")
    if not (host and port.isascii() and port.isdigit()) or "/" in host:
        raise InputError(f"{RAY_ADDRESS}: {address} is no HOST:PORT of a Ray head node; 6379 is the usual port")
    try:
        with socket.create_connection((host, int(port)), ANSWER_SECONDS) as connection:
            is_ray = _speaks_grpc(connection)
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(
            f"{RAY_ADDRESS}: no Ray head node answers at {address} ({getattr(error, 'strerror', None) or error}); "
            "start one, or unset the variable to train on this machine alone"
        ) from error
    if not is_ray:
        raise InputError(
            f"{RAY_ADDRESS}: what answers at {address} is no Ray head node; its port is 6379 as a rule, not the "
            "dashboard's"
        )


def _speaks_grpc(connection: socket.socket) -> bool:
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        # greets in another way, and is not looked at further
        return True
    connection.settimeout(GREETING_SECONDS)
    try:
        connection.sendall(_GREETING)
        return connection.recv(9)[3:4] == _SETTINGS
    except OSError:
        return False
