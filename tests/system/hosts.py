"""Hosts of their own on one machine: network namespaces on a bridge, and a Ray cluster over them. Needs root."""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.system.services import kill_session, start_ray


def is_possible() -> bool:
    return os.geteuid() == 0 and all(shutil.which(program) for program in ("ip", "nsenter", "unshare"))


class Network:
    """Hosts with addresses of their own, on a bridge. This process is on it too, as host 254."""

    def __init__(self) -> None:
        self._prefix = secrets.token_hex(2)
        self._bridge = f"br{self._prefix}"
        # what a killed run left behind would take the packets of a network of the same addresses
        self._network = f"10.83.{secrets.randbelow(256)}"
        self._numbers: list[int] = []
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("address", "add", f"{self.address(254)}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")

    def address(self, number: int) -> str:
        return f"{self._network}.{number}"

    def add(self, number: int, ray_folder: Path) -> tuple[str | Path, ...]:
        """The beginning of commands that run on a new host, which takes `ray_folder` for /tmp/ray."""
        name, cable, inside = self._name(number), self._cable(number), f"i{self._prefix}{number}"
        self._numbers.append(number)
        _ip("netns", "add", name)
        _ip("link", "add", cable, "type", "veth", "peer", "name", inside)
        _ip("link", "set", cable, "master", self._bridge, "up")
        _ip("link", "set", inside, "netns", name)
        for command in (
            ("address", "add", f"{self.address(number)}/24", "dev", inside),
            ("link", "set", inside, "up"),
            ("link", "set", "lo", "up"),
        ):
            _ip("netns", "exec", name, "ip", *command)
        ray_folder.mkdir()
        Path("/tmp/ray").mkdir(exist_ok=True)
        bound = 'mount --bind "$0" /tmp/ray && exec "$@"'
        # ip netns exec would mount another /sys, without the control groups that slurmd looks for
        return ("nsenter", f"--net=/run/netns/{name}", "unshare", "--mount", "sh", "-c", bound, ray_folder)

    def cut_off(self, number: int) -> None:
        """Pulls a host's cable; what runs there goes on and hears nothing more."""
        _ip("link", "set", self._cable(number), "down")

    def trains(self, number: int) -> bool:
        """Whether a pack is at work on a host."""
        pids = subprocess.run(
            ["ip", "netns", "pids", self._name(number)], capture_output=True, text=True
        ).stdout.split()
        titles = [_title(pid) for pid in pids]
        return any("ray::ResourceTrainable.train" in title for title in titles)

    def close(self) -> None:
        for number in self._numbers:
            subprocess.run(["ip", "netns", "delete", self._name(number)], capture_output=True)
        subprocess.run(["ip", "link", "delete", self._bridge], capture_output=True)

    def _name(self, number: int) -> str:
        return f"qk{self._prefix}-{number}"

    def _cable(self, number: int) -> str:
        return f"o{self._prefix}{number}"


class RayHosts:
    """A head that only drives, and workers of one CPU; each host has an address, and a /tmp/ray of its own.

    A person submits from host 254. With `pinned` worker 2 has the machine's first CPU only, worker 3 the second, and
    so on.
    """

    def __init__(self, workers: int, pinned: bool = False) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rh"))
        self.token = self.folder / "token"
        self.token.touch(0o600)
        self.token.write_text(secrets.token_hex(32))
        self._environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pinned = pinned
        self._network = Network()
        self.cut_off, self.trains = self._network.cut_off, self._network.trains
        # of the cluster's file, for `orchestrate submit`
        self.settings = {
            "backend": "ray",
            "address": f"http://{self._network.address(1)}:8265",
            "token_file": str(self.token),
            "python": sys.executable,
        }
        self._start(1, "--head", "--port=6379", "--num-cpus=0", "--include-dashboard=true", "--dashboard-host=0.0.0.0")
        for number in range(workers):
            self.add_worker(2 + number)

    def add_worker(self, number: int) -> None:
        """A host with the address `number` in the network, which joins."""
        self._start(number, f"--address={self._network.address(1)}:6379", "--num-cpus=1")

    def close(self) -> None:
        for process in self._processes:
            kill_session(process)
        self._network.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, number: int, *arguments: str) -> None:
        on_host = self._network.add(number, self.folder / f"ray-{number}")
        ray = Path(sys.executable).with_name("ray")
        options = ("--block", "--disable-usage-stats", "--object-store-memory=80000000")
        cpu = sorted(os.sched_getaffinity(0))[number - 2] if self._pinned and number > 1 else None
        pin = ("taskset", "--cpu-list", str(cpu)) if cpu is not None else ()
        command = [
            *(*pin, *on_host, ray, "start"),
            *(f"--node-ip-address={self._network.address(number)}", *arguments, *options),
        ]
        self._processes.append(start_ray(command, self.folder / f"host-{number}", self._environment))


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _title(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
