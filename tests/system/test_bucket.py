"""Sweeps in an object store: the results of a folder's, whatever machine is lost, and no machine is needed."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from orchestrator.ledger import Ledger
from orchestrator.ledger_postgres import SweepSchema, schema_name
from orchestrator.ledger_records import Training
from qkmodel.dictionary import load_dictionary
from tests.system.hosts import is_possible
from tests.system.progress import wait_for_tokens
from tests.system.services import PostgresServer, RayCluster, S3Server, free_port, kill_session, postgres_or_skip
from tests.system.test_first_sweep import FILE
from tests.system.test_mask_sweep import MASK as ALL_MASKS

pytestmark = pytest.mark.system

END_SECONDS = 600
TOKENS = 65_536
MASK = ALL_MASKS | {
    "search": {"sampler": "grid", "trainings": 2, "space": {"pair_cost": 1e-6, "learning_rate": 0.1, "joint": False}}
}
TRAINING = FILE["training"] | {"tokens": TOKENS, "report_tokens": 4096}


@pytest.fixture(scope="module")
def store() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with postgres_or_skip() as server:
        yield server


@dataclass(frozen=True)
class Sweep:
    """A sweep file in a folder of its own, the cache folder of the machine it is started on, and its ledger."""

    file: Path
    home: Path
    ledger_address: str | None
    environment: dict[str, str]

    @classmethod
    def create(cls, folder: Path, storage: str, ledger: str | None = None, **more: Any) -> "Sweep":
        folder.mkdir()
        content = FILE | {"training": TRAINING, "storage": storage}
        if more.get("task") == "pair_mask":
            content.pop("pack")
        if ledger is not None:
            # a server that is away: what MLflow gets is not looked at here
            content |= {"ledger": ledger, "tracking": f"http://127.0.0.1:{free_port()}"}
        OmegaConf.save(OmegaConf.create(content | more), folder / "sweep.yaml")
        environment = S3Server.CREDENTIALS | {"XDG_CACHE_HOME": str(folder / "home")}
        return cls(folder / "sweep.yaml", folder / "home", ledger, environment)

    @property
    def name(self) -> str:
        return OmegaConf.load(self.file).name

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.file.parent / "log").open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "orchestrator", *arguments],
                env=os.environ | self.environment,
                cwd=self.file.parent,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ask(self, *arguments: str, code: int = 0) -> str:
        """What `orchestrate …` printed."""
        (self.file.parent / "log").unlink(missing_ok=True)
        process = self.start(*arguments)
        try:
            assert process.wait(timeout=END_SECONDS) == code, self.said
        finally:
            kill_session(process)
        return self.said

    def run(self) -> str:
        return self.ask("sweep", str(self.file))

    @property
    def said(self) -> str:
        return (self.file.parent / "log").read_text()

    def lose_machine(self) -> None:
        shutil.rmtree(self.home)

    def _place(self) -> Path | SweepSchema:
        folder = self.file.parent / "runs" / self.name
        if self.ledger_address is None:
            return folder / "ledger.sqlite"
        return SweepSchema(self.ledger_address, schema_name(self.name), folder, None, reading=True)

    def trainings(self) -> list[Training]:
        ledger = Ledger.open_if_there(self._place())
        if ledger is None:
            return []
        try:
            return ledger.trainings()
        finally:
            ledger.close()

    def hashes(self) -> dict[str, str | None]:
        found = {one.label: one.dictionary_sha256 for one in self.trainings() if one.state == "finished"}
        assert found
        return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """The hashes that the same sweep has in a folder."""
    folder = tmp_path_factory.mktemp("undisturbed") / "sweep"
    sweep = Sweep.create(folder, str(folder / "runs"))
    sweep.run()
    return sweep.hashes()


@pytest.mark.slow
def test_results_are_those_of_a_folder_and_need_no_machine(
    store: S3Server, postgres: PostgresServer, undisturbed: dict[str, str | None], tmp_path: Path
) -> None:
    sweep = Sweep.create(tmp_path / "bucket", store.url("same"), postgres.ledgers)
    sweep.run()
    assert sweep.hashes() == undisturbed
    assert_nothing_left_but_copies(sweep.home)
    # what was trained is in the bucket alone, and nothing else is needed
    sweep.lose_machine()
    said = sweep.run()
    assert "nothing left to do" in said and "layer 1: front of" in said
    address = store.url("same/first")
    record = json.loads(sweep.ask("fronts", address, "--json"))
    dictionary = record["fronts"][0]["trainings"][0]["dictionary"]
    assert dictionary.startswith(f"s3://{store.BUCKET}/same/first/dictionaries/") and store.endpoint in dictionary
    assert json.loads(sweep.ask("status", str(sweep.file), "--json"))["folder"] == address
    sweep.ask("export", address, "--layer", "1", "--output", str(tmp_path / "exported"))
    assert load_dictionary(tmp_path / "exported").config.geometry.layer == 1
    page = sweep.ask("report", address).splitlines()
    assert page[-1 if "MLflow" not in page[-1] else -2] == store.url("same/first/report.html")
    assert len(store.read("same/first/report.html")) > 1_000_000
    explained = sweep.ask("explain", dictionary, "--head", "0", "--prompt", "When Mary and John went")
    assert "Mary" in explained
    # masks of what is in the bucket, on a machine that has none of it
    masks = Sweep.create(tmp_path / "masks", store.url("same"), postgres.ledgers, **MASK | {"name": "masks"})
    masks.run()
    front = {one["dictionary_sha256"][:16] for one in record["fronts"][0]["trainings"]}
    assert {one.hyperparameters["dictionary"] for one in masks.trainings()} == front
    assert {one.state for one in masks.trainings()} == {"finished"}


@pytest.mark.slow
def test_a_driver_whose_machine_is_lost_goes_on_from_the_bucket(
    store: S3Server, postgres: PostgresServer, undisturbed: dict[str, str | None], tmp_path: Path
) -> None:
    sweep = Sweep.create(tmp_path / "lost", store.url("lost"), postgres.ledgers, name="lost")
    process = sweep.start("sweep", str(sweep.file))
    try:
        done = wait_for_tokens(sweep, process)
        process.terminate()
        # asked to end, packs hear of it through the bucket
        assert process.wait(timeout=10) == 143, sweep.said
        process = sweep.start("sweep", str(sweep.file))
        wait_for_tokens(sweep, process, more_than=done)
    finally:
        kill_session(process)
    done = {one.training_id: one.tokens_done for one in sweep.trainings()}
    assert 0 < max(done.values()) < TOKENS
    assert any(name.startswith("checkpoints/") for name in store.names("lost/lost"))
    sweep.lose_machine()
    said = sweep.run()
    # neither activations nor baselines were made again
    assert "loading" not in said and "measuring its baselines" not in said
    assert sweep.hashes() == undisturbed
    assert all(one.failures == 0 for one in sweep.trainings())
    assert not any(name.startswith("checkpoints/") for name in store.names("lost/lost"))


@pytest.mark.slow
def test_nodes_that_share_nothing(
    store: S3Server, postgres: PostgresServer, undisturbed: dict[str, str | None], tmp_path: Path
) -> None:
    sweep = Sweep.create(tmp_path / "nodes", store.url("nodes"), postgres.ledgers, name="nodes", pack=1)
    sweep.home.mkdir()
    # on the nodes the driver's files are out of sight, as another machine's would be
    hiding = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(sweep.home))
    cluster = RayCluster(nodes=0)
    homes = [tmp_path / "node-0", tmp_path / "node-1"]
    try:
        for home in homes:
            own = S3Server.CREDENTIALS | {"XDG_CACHE_HOME": str(home)}
            cluster.add_node(before=hiding if is_possible() else (), environment=own)
        sweep.environment.update(cluster.client_environment)
        sweep.run()
    finally:
        cluster.close()
    assert sweep.hashes() == undisturbed
    for home in homes:
        assert list((home / "qkmodel" / "shards").rglob("*.safetensors"))
        assert_nothing_left_but_copies(home)


def assert_nothing_left_but_copies(home: Path) -> None:
    """Of what was trained, no file is left on a machine."""
    files = [path for path in home.rglob("*") if path.is_file()]
    assert not [path for path in files if {"checkpoints", "dictionaries", ".borrowed"} & set(path.parts)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bucket": "nowhere"}, "there is no such bucket"),
        ({"endpoint": "127.0.0.1:9"}, "no server answers"),
        ({"endpoint": "silent"}, "no server answers there (timed out)"),
        ({"endpoint": "strict"}, "the credentials do not give access to it"),
    ],
    ids=["no such bucket", "dead endpoint", "silent endpoint", "wrong key"],
)
def test_a_bucket_that_does_not_do_is_refused_at_once(
    store: S3Server, change: dict[str, str], said: str, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as held:
        url = store.url("refused").replace(S3Server.BUCKET, change.get("bucket", S3Server.BUCKET))
        url = url.replace(store.endpoint, held.enter_context(endpoint(change.get("endpoint", store.endpoint))))
        sweep = Sweep.create(tmp_path / "refused", url, "postgresql://nobody@127.0.0.1:9/ledgers")
        began = time.monotonic()
        (line,) = sweep.ask("sweep", str(sweep.file), code=2).splitlines()
        assert time.monotonic() - began < 15
        assert line.startswith(f"error: {sweep.file}: storage: s3://") and said in line
        assert not sweep.home.exists()


@contextlib.contextmanager
def endpoint(kind: str) -> Iterator[str]:
    """HOST:PORT of a server of a kind, of an object store that knows nobody, say; or what `kind` says itself."""
    if kind == "silent":
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen(50)
            yield f"127.0.0.1:{server.getsockname()[1]}"
    elif kind == "strict":
        # its bucket is made before it begins to ask
        server = S3Server({"INITIAL_NO_AUTH_ACTION_COUNT": "2"})
        yield server.endpoint
        server.close()
    else:
        yield kind
