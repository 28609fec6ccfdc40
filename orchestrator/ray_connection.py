"""The Ray that packs run on: one of this process's own, or the cluster that `RAY_ADDRESS` names."""

import contextlib
import logging
import math
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.config import PackResources
from orchestrator.plan_checks import AUTOSCALING, RAY_ADDRESS, machine_cpus, machine_gpus
from orchestrator.plan_figures import packs_at_once
from orchestrator.process_end import end_process
from orchestrator.storage.shared import SHARED, Storage
from orchestrator.storage_check import check_bucket
from qkmodel.errors import InputError

CAPACITY_SECONDS = 1.0
# what a node needs to start a first worker and import this
NODES_SECONDS = 30.0
HEAD_SECONDS = 3.0
HEAD_PATIENCE_SECONDS = 12.0
RAY_ENDED = "Ray ended; the same command continues the sweep where it was"


@contextlib.contextmanager
def connected_ray() -> Iterator[None]:
    """Ray for the block; what it has to say stays in its own logs, below /tmp/ray.

    Raises InputError when the cluster at `RAY_ADDRESS` lets nobody in.
    """
    # a dead worker is the queue's to report, in one line
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    on_termination = signal.getsignal(signal.SIGTERM)
    # Ray prints what its nodes report, a dead worker for example, whatever log_to_driver says
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            _connect()
        except SystemExit:
            # what Ray's own handler of SIGTERM raises while Ray starts
            signal.signal(signal.SIGTERM, on_termination)
            ray.shutdown()
            raise KeyboardInterrupt(signal.SIGTERM) from None
        # and later it ends in a C++ crash dump
        signal.signal(signal.SIGTERM, on_termination)
        over = threading.Event()
        head = ray.get_runtime_context().gcs_address
        threading.Thread(target=_watch_head, args=(head, over), name="ray-head", daemon=True).start()
        try:
            yield
        finally:
            over.set()
            ray.shutdown()
            # which takes the handler away without a word to Python
            signal.signal(signal.SIGTERM, on_termination)


def ask_cluster(folder: Path, pack: PackResources, storage: Storage = SHARED) -> int | None:
    """How many packs the cluster at `RAY_ADDRESS` holds at once, or may grow to; None where there is no cluster.

    Refuses one that lets nobody in, or whose nodes do not share `folder`, or cannot write to the bucket that `storage`
    is: raises InputError. Leaves nothing behind.
    """
    if not os.environ.get(RAY_ADDRESS):
        return None
    with connected_ray():
        if storage.url is not None:
            _check_nodes(_bucket_looks_wrong, storage.url, storage.url)
        else:
            there = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
            with tempfile.NamedTemporaryFile(dir=there, prefix=".shared-") as marker:
                _check_nodes(_folder_looks_wrong, marker.name, str(folder))
        packs = max(packs_may_come(), Capacity(pack).held())
    if packs == 0:
        gpus = f" and {pack.gpu:g} GPUs" if pack.gpu else ""
        raise InputError(f"resources.pack: no node of the cluster has {pack.cpu:g} CPUs{gpus} for a pack; ask for less")
    return packs


def _check_nodes(looks_wrong: Callable[[str], str | None], place: str, shown: str) -> None:
    """Has every node that packs may land on look at a place, which people know as `shown`."""
    nodes = {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"] and (node["Resources"].get("CPU") or node["Resources"].get("GPU"))
    }
    look = ray.remote(num_cpus=0, max_retries=0)(looks_wrong)
    asked = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(place): address
        for node, address in nodes.items()
    }
    waiting, deadline = list(asked), time.monotonic() + NODES_SECONDS
    while waiting:
        # each as it answers: what one finds need not wait for a node that is slow
        answered, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not answered:
            return
        _check_answer(answered[0], asked[answered[0]], shown)


def _check_answer(answer: ray.ObjectRef, address: str, shown: str) -> None:
    try:
        wrong = ray.get(answer)
    except (ray.exceptions.NodeDiedError, ray.exceptions.TaskUnschedulableError):
        # it went away just now, and takes no pack either
        return
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(
            f"{RAY_ADDRESS}: node {address} cannot run packs ({reason}); every node needs this installation"
        ) from error
    if wrong is not None:
        raise InputError(
            f"storage: {shown}: on node {address} {wrong}; all nodes have to share it and be able to write"
        )


def _bucket_looks_wrong(url: str) -> str | None:
    """What a node finds wrong with a bucket."""
    try:
        check_bucket(url)
    except InputError as error:
        return f"it does not do ({error})"
    return None


def _folder_looks_wrong(marker: str) -> str | None:
    """What a node finds wrong with the folder of a file that another made."""
    path = Path(marker)
    if not path.exists():
        return "it is another folder, or none"
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            return None
    except OSError as error:
        return f"it cannot be written to ({error.strerror})"


def _watch_head(address: str, over: threading.Event) -> None:
    """Ends this process once the head is gone for long: its main thread may be in a call that does not return.

    Ray would end it too, after a minute and with a crash dump. The next start finds everything in the ledger.
    """
    gone_since = None
    while not over.wait(HEAD_SECONDS):
        if _answers(address):
            gone_since = None
        elif gone_since is None:
            gone_since = time.monotonic()
        elif time.monotonic() - gone_since > HEAD_PATIENCE_SECONDS:
            end_process(f"error: {RAY_ENDED}\n", 1)


def _connect() -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get(RAY_ADDRESS)
    if not address:
        # "local": a cluster that happens to run on this machine is not ours to use
        ray.init(address="local", num_cpus=machine_cpus(), num_gpus=machine_gpus(), include_dashboard=False, **quiet)
        return
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"{RAY_ADDRESS}: {address}: {reason}; if the cluster asks for a token, "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH must be set here too"
        ) from error


def head_answers() -> bool:
    """Whether the head node is there. Asked first, since a question to Ray itself waits a minute for a dead one."""
    return _answers(ray.get_runtime_context().gcs_address)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), HEAD_SECONDS).close()
    except OSError:
        return False
    return True


def packs_may_come() -> int:
    """How many packs a cluster whose nodes come when they are asked for may grow to; 0 where they do not."""
    written = os.environ.get(AUTOSCALING, "")
    return int(written) if written.isascii() and written.isdigit() else 0


class Capacity:
    """How many packs the nodes that are alive can hold; nodes may come and go.

    Where nodes come when they are asked for, one pack more than that: Ray's autoscaler asks for what is waiting.
    """

    def __init__(self, pack: PackResources) -> None:
        self._pack = pack
        self._packs = 1
        self._asked = -math.inf

    def __call__(self) -> int:
        if time.monotonic() >= self._asked + CAPACITY_SECONDS:
            self._asked = time.monotonic()
            # a dead head is noticed elsewhere
            if not head_answers():
                return 0
            held = self.held()
            self._packs = held + 1 if held < packs_may_come() else held
        return self._packs

    def held(self) -> int:
        """What fits by now."""
        return sum(self._packs_of(node["Resources"]) for node in ray.nodes() if node["Alive"])

    def _packs_of(self, node: dict[str, float]) -> int:
        return packs_at_once(node.get("CPU", 0), node.get("GPU", 0), self._pack)
