"""A SLURM of one node on this machine, from Debian's slurmctld, slurmd, slurm-client and munge, run by root."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from tests.system.services import free_port, kill_session

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel")
READY_SECONDS = 30
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
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
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=work Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP PriorityTier=2
"""


def is_installed() -> bool:
    return os.geteuid() == 0 and all(shutil.which(program) for program in PROGRAMS)


class Slurm:
    """The three daemons; `environment` is what SLURM's commands need to find them."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm"))
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        configuration = self.folder / "slurm.conf"
        configuration.write_text(
            CONFIGURATION.format(
                host=socket.gethostname().partition(".")[0],
                folder=self.folder,
                controller_port=free_port(),
                node_port=free_port(),
                cpus=len(os.sched_getaffinity(0)),
            )
        )
        self.environment = {"SLURM_CONF": str(configuration)}
        key = self.folder / "munge.key"
        key.touch(0o400)
        key.write_bytes(secrets.token_bytes(1024))
        self._daemons = [
            self._start(
                *("munged", "--force", "--foreground", f"--key-file={key}"),
                *(f"--{name}={self.folder}/munge.{name.partition('-')[0]}" for name in ("socket", "pid-file")),
                *(f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/seed"),
            )
        ]
        self._wait(lambda: (self.folder / "munge.socket").exists())
        self._daemons.append(self._start("slurmctld", "-D", "-i"))
        self._daemons.append(self._start("slurmd", "-D"))
        self._wait(lambda: "idle" in self.ask("sinfo", "--noheader", "--format=%T"))

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

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{command[0]}.out").open("w") as output:
            return subprocess.Popen(
                command,
                env=os.environ | self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait(self, is_ready) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while not is_ready():
            if time.monotonic() > deadline:
                raise TimeoutError("\n".join(file.read_text() for file in self.folder.glob("*.out")))
            time.sleep(0.2)
