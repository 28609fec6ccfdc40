"""What a sweep may have beside it, on this machine: a Ray cluster, an MLflow server, PostgreSQL, an object store."""

import contextlib
import getpass
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Self

import psutil
import pytest
from pyarrow import fs

READY_SECONDS = 90


def session_of(leader: int) -> Iterator[psutil.Process]:
    """All processes of the session that `leader` leads or led."""
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == leader:
                yield process


def kill_session(leader: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    for process in session_of(leader.pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    leader.wait()


def free_port() -> int:
    """Below those that the kernel gives to clients, and that Ray listens on unasked (44217 and 44227)."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("none of a hundred ports is free")


class RayCluster:
    """A head without CPUs and nodes of one CPU each, as `ray start` makes them on several machines.

    With `dashboard_port` it takes jobs there. On one machine a job's working directory is taken from under it as soon
    as another node unpacks the same, so what submits jobs gives the head the CPUs.
    """

    def __init__(self, nodes: int, dashboard_port: int | None = None, head_cpus: int = 0) -> None:
        # Ray's socket paths must be short
        self.folder = Path(tempfile.mkdtemp(prefix="rc"))
        (self.folder / "ray").mkdir()
        token = self.folder / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        self.address = f"127.0.0.1:{free_port()}"
        own = {"RAY_TMPDIR": str(self.folder), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self._environment = os.environ | own
        self.client_environment = own | {"RAY_ADDRESS": self.address}
        port = self.address.rpartition(":")[2]
        dashboard = (
            ("--include-dashboard=false",)
            if dashboard_port is None
            else ("--include-dashboard=true", f"--dashboard-port={dashboard_port}")
        )
        self._head = self._start("--head", f"--port={port}", f"--num-cpus={head_cpus}", *dashboard)
        self.nodes: list[subprocess.Popen[bytes]] = []
        for _ in range(nodes):
            self.add_node()

    def add_node(self, before: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        """`before` is the beginning of the command that starts the node, `environment` what it has of its own."""
        address = f"--address={self.address}"
        self.nodes.append(self._start(address, "--num-cpus=1", before=before, environment=environment))

    def kill_node(self, index: int) -> None:
        """As if the machine had lost its power."""
        kill_session(self.nodes.pop(index))

    def kill_head(self) -> None:
        kill_session(self._head)

    def workers(self) -> list[psutil.Process]:
        """The processes in which packs train."""
        found = []
        for node in self.nodes:
            for process in session_of(node.pid):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if any("ray::ResourceTrainable" in word for word in process.cmdline()):
                        found.append(process)
        return found

    def close(self) -> None:
        for one in (*self.nodes, self._head):
            kill_session(one)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(
        self, *arguments: str, before: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Waited for: two nodes that start at once on one machine take each other's ports."""
        options = ("--block", "--disable-usage-stats", "--object-store-memory=80000000")
        # jobs are handed to an agent, and clusters of one machine would take each other's port
        options += (f"--dashboard-agent-listen-port={free_port()}",)
        log = self.folder / f"node-{len(list(self.folder.glob('node-*')))}"
        command = [*before, Path(sys.executable).with_name("ray"), "start", *arguments, *options]
        return start_ray(command, log, self._environment | (environment or {}))


def start_ray(command: Sequence[str | Path], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """`ray start --block` in a session of its own, once the node is there."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    deadline = time.monotonic() + READY_SECONDS
    while "--block" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(log.read_text())
        time.sleep(0.2)
    return process


class MlflowServer:
    """`mlflow server` on a store that outlives it: an SQLite file in `folder`, or the database at `store`.

    `options` go to its command line, `environment` beside this process's own.
    """

    def __init__(
        self,
        folder: Path,
        store: str | None = None,
        options: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = folder
        self._store = store or f"sqlite:///{folder}/server.db"
        self._options = options
        self._environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **(environment or {})}
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
            *("--host", "127.0.0.1", "--port", str(self._port)),
            *("--backend-store-uri", self._store),
            *("--artifacts-destination", str(self._folder / "server-artifacts")),
            *self._options,
        ]
        with (self._folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                command,
                env=os.environ | self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        _wait_for_mlflow(self.url)

    def kill(self) -> None:
        kill_session(self._process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()


@contextlib.contextmanager
def mlflow_ui(sweep: str, folder: Path) -> Iterator[str]:
    """`orchestrate ui SWEEP` in a folder, and its address."""
    port = free_port()
    command = [sys.executable, "-m", "orchestrator", "ui", sweep, "--port", str(port)]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=folder, start_new_session=True, **silent)
    try:
        _wait_for_mlflow(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        kill_session(process)


def _wait_for_mlflow(address: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


class S3Server:
    """An object store that speaks S3 (moto's, in memory), with a bucket `sweeps`. It takes any credentials."""

    BUCKET = "sweeps"
    # of nobody
    CREDENTIALS: ClassVar = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "nothing secret"}

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self.port = free_port()
        self.endpoint = f"127.0.0.1:{self.port}"
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self._process = subprocess.Popen(
            command, env=os.environ | (environment or {}), start_new_session=True, **silent
        )
        self._wait()
        self.files().create_dir(self.BUCKET)

    def url(self, prefix: str) -> str:
        """As a sweep file names it."""
        return f"s3://{self.BUCKET}/{prefix}?endpoint_override={self.endpoint}&region=us-east-1&scheme=http"

    def files(self) -> fs.S3FileSystem:
        return fs.S3FileSystem(
            access_key="tests",
            secret_key="nothing secret",
            endpoint_override=self.endpoint,
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
        )

    def names(self, prefix: str) -> set[str]:
        """Of all objects below a prefix, without it."""
        start = f"{self.BUCKET}/{prefix}"
        found = self.files().get_file_info(fs.FileSelector(start, recursive=True, allow_not_found=True))
        return {one.path[len(start) + 1 :] for one in found if one.is_file}

    def read(self, name: str) -> bytes:
        with self.files().open_input_stream(f"{self.BUCKET}/{name}") as stream:
            return stream.read()

    def close(self) -> None:
        kill_session(self._process)

    def _wait(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)


class PostgresServer:
    """PostgreSQL from Debian's packages, with an empty database `mlflow` and one `ledgers`.

    Over a Unix socket nobody else may use, and over TCP with a password, which `url` and `ledgers` do without.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pg"))
        self.port = free_port()
        # the server refuses to run as root
        self._as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        if self._as_user:
            shutil.chown(self.folder, "postgres")
        self.user = "postgres" if self._as_user else getpass.getuser()
        access = ("--auth-local=trust", "--auth-host=scram-sha-256")
        self._run("initdb", "--no-sync", *access, "--encoding=UTF8", "-D", f"{self.folder}/data")
        self.start()
        for database in ("mlflow", "ledgers"):
            self._run("createdb", "-h", str(self.folder), "-p", str(self.port), database)

    @staticmethod
    def is_installed() -> bool:
        return _postgres_program("initdb") is not None

    @property
    def url(self) -> str:
        """MLflow's."""
        return self._address("postgresql+psycopg2", "mlflow")

    @property
    def ledgers(self) -> str:
        """As a sweep file names it."""
        return self._address("postgresql", "ledgers")

    def sql(self, statement: str, database: str = "ledgers") -> None:
        place = ("-h", str(self.folder), "-p", str(self.port), "-d", database)
        self._run("psql", *place, "-v", "ON_ERROR_STOP=1", "-q", "-c", statement)

    def start(self) -> None:
        # what a crash of the machine would do to it is nothing that tests look at
        options = f"-k {self.folder} -p {self.port} -c listen_addresses=127.0.0.1 -c fsync=off"
        self._run("pg_ctl", "-D", f"{self.folder}/data", "-o", options, "-l", f"{self.folder}/log", "-w", "start")

    def stop(self, mode: str = "fast") -> None:
        self._run("pg_ctl", "-D", f"{self.folder}/data", "-m", mode, "stop")

    def close(self) -> None:
        if (self.folder / "data" / "postmaster.pid").exists():
            self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _address(self, scheme: str, database: str) -> str:
        return f"{scheme}://{self.user}@/{database}?host={self.folder}&port={self.port}"

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._as_user, _postgres_program(program), *arguments]
        subprocess.run(command, check=True, cwd="/", stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def postgres_or_skip() -> Iterator[PostgresServer]:
    """A PostgreSQL of the test's own; without one installed the test is skipped."""
    if not PostgresServer.is_installed():
        pytest.skip("PostgreSQL is not installed")
    server = PostgresServer()
    try:
        yield server
    finally:
        server.close()


def _postgres_program(name: str) -> str | None:
    places = [str(folder) for folder in Path("/usr/lib/postgresql").glob("*/bin")]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))
