"""A SLURM on this machine, from Debian's slurmctld, slurmd, slurm-client and munge, run by root.

Its one node is the machine itself, or it has nodes that are hosts of a network.
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.system.hosts import Network
from tests.system.services import free_port, kill_session

# ray symmetric-run ends every Ray that it sees, which are those of its host
OF_ITS_OWN = ("unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel")
READY_SECONDS = 30
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}({address})
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort={controller_port}
SlurmdPort={node_port}
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
JobRequeue=1
# long enough for a sweep's checkpoints
KillWait=30
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=work Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


def is_installed() -> bool:
    return os.geteuid() == 0 and all(shutil.which(program) for program in PROGRAMS)


class Slurm:
    """One node, which is this machine; `environment` is what SLURM's commands need to find it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm"))
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []
        try:
            self._start_all()
            self._wait(lambda: set(self.ask("sinfo", "--noheader", "--format=%T").split()) == {"idle"})
        except BaseException:
            self.close()
            raise

    def _start_all(self) -> None:
        name, cpus = socket.gethostname().partition(".")[0], len(os.sched_getaffinity(0))
        self._start_controller("127.0.0.1", [f"NodeName={name} NodeAddr=127.0.0.1 CPUs={cpus}"])
        self._start("slurmd", "-D")

    def _start_controller(self, address: str, nodes: list[str]) -> None:
        """And munge; `nodes` are lines of the configuration."""
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=socket.gethostname().partition(".")[0],
                address=address,
                folder=self.folder,
                controller_port=free_port(),
                node_port=free_port(),
                nodes="\n".join(nodes),
            )
        )
        key = self.folder / "munge.key"
        key.touch(0o400)
        key.write_bytes(secrets.token_bytes(1024))
        self._start(
            *("munged", "--force", "--foreground", f"--key-file={key}"),
            *(f"--{name}={self.folder}/munge.{name.partition('-')[0]}" for name in ("socket", "pid-file")),
            *(f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/seed"),
        )
        self._wait(lambda: (self.folder / "munge.socket").exists())
        self._start("slurmctld", "-D", "-i")

    def ask(self, *command: str) -> str:
        """Standard output of one of SLURM's commands, whether it succeeds or not."""
        return subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True).stdout

    def close(self) -> None:
        self.ask("scancel", "--user=root")
        # a sweep that is not told to end would outlive its SLURM
        with contextlib.suppress(TimeoutError):
            self._wait(lambda: not self.ask("squeue", "--noheader").strip())
        for daemon in reversed(self._daemons):
            with contextlib.suppress(ProcessLookupError):
                kill_session(daemon)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, *command: str | Path) -> None:
        with (self.folder / f"{len(self._daemons)}.out").open("w") as output:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    env=os.environ | self.environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def _wait(self, is_ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while not is_ready():
            if time.monotonic() > deadline:
                said = [file.read_text() for file in sorted(self.folder.glob("*.out"))]
                raise TimeoutError("\n".join(said))
            time.sleep(0.2)


class SlurmHosts(Slurm):
    """Nodes of one CPU that are hosts of a network, each with a name, processes and a /tmp/ray of its own."""

    def __init__(self, nodes: int) -> None:
        self._numbers = range(1, 1 + nodes)
        self._network = Network()
        self.trains = self._network.trains
        super().__init__()

    def _start_all(self) -> None:
        address = self._network.address
        self._start_controller(
            address(254), [f"NodeName=node{one} NodeAddr={address(one)} CPUs=1" for one in self._numbers]
        )
        for number in self._numbers:
            self._start_node(number)

    def close(self) -> None:
        super().close()
        self._network.close()

    def _start_node(self, number: int) -> None:
        names = self.folder / f"hosts-{number}"
        # as Debian writes it: a machine's own name is no address at which others reach it
        addresses = {f"node{one}": self._network.address(one) for one in self._numbers}
        addresses |= {"localhost": "127.0.0.1", f"node{number}": "127.0.1.1"}
        names.write_text("".join(f"{address} {name}\n" for name, address in addresses.items()))
        on_host = self._network.add(number, self.folder / f"ray-{number}")
        # a shell takes in the processes whose parents have ended
        inside = 'hostname "$0" && mount --bind "$1" /etc/hosts && { slurmd -D & wait; }'
        self._start(*on_host, *OF_ITS_OWN, "sh", "-c", inside, f"node{number}", names)
