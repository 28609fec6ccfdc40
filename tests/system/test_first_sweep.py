"""A sweep as a user runs it: the bundled model and text, the command line, Ray, the ledger, MLflow, a kill.

The tests read snapshots that the fixtures took after each start, so they may run in any order.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from omegaconf import OmegaConf

from orchestrator.ledger import Ledger, Training
from orchestrator.ledger_file import LEDGER_FILE
from orchestrator.status import status_record
from orchestrator.tracking_run import shown_name
from qkmodel.configs import ModelConfig
from qkmodel.dictionary import load_dictionary
from qkmodel.errors import InputError
from qkmodel.language_model import load_language_model
from tests.orchestrator.test_cli import orchestrate

pytestmark = pytest.mark.system

TOKENS, REPORT_TOKENS = 4096, 1024
FILE = {
    "name": "first",
    "model": "smollm2-135m",
    "layers": [1],
    "corpus": {"name": "sotu", "bos": "<|endoftext|>"},
    "training": {
        "tokens": TOKENS,
        "report_tokens": REPORT_TOKENS,
        "batch_sequences": 2,
        "validation_sequences": 16,
        "cross_entropy_sequences": 2,
    },
    "search": {
        "sampler": "grid",
        "trainings": 2,
        "space": {"dictionary_size": [128, 256], "activation": "topk", "k": 8, "learning_rate": 6e-3},
    },
    "pack": 2,
}
PROMPT, HEAD = "When Mary and John went to the store, John gave a drink to", 2
LARGER_GRID = ("search.space.dictionary_size=[128,256,512]", "search.trainings=3")


@dataclass(frozen=True)
class Sweep:
    """A sweep file in a folder of its own, and the commands on it."""

    folder: Path

    @classmethod
    def create(cls, folder: Path, **training: int) -> "Sweep":
        folder.mkdir()
        sweep = FILE | {"storage": str(folder / "runs"), "training": FILE["training"] | training}
        OmegaConf.save(OmegaConf.create(sweep), folder / "first.yaml")
        return cls(folder)

    @property
    def storage(self) -> Path:
        return self.folder / "runs"

    @contextlib.contextmanager
    def started(self, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
        """`orchestrate …` in a session of its own, and the folder in which its output is.

        Whatever is left of the session at the end is killed.
        """
        output = Path(tempfile.mkdtemp(dir=self.folder))
        with (output / "out").open("w") as out, (output / "err").open("w") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator", *arguments],
                stdout=out,
                stderr=err,
                cwd=self.folder,
                start_new_session=True,
                text=True,
            )
        try:
            yield process, output
        finally:
            # Ray's workers are in process groups of their own, but in this session
            for other in psutil.process_iter():
                with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                    if os.getsid(other.pid) == process.pid:
                        other.kill()
            process.wait()

    def run(self, *arguments: str) -> tuple[str, str]:
        """(stdout, stderr) of `orchestrate …`, which has to succeed."""
        with self.started(*arguments) as (process, output):
            code = process.wait(timeout=600)
        out, err = (output / "out").read_text(), (output / "err").read_text()
        assert code == 0, err
        return out, err

    def sweep(self, *overrides: str) -> "Snapshot":
        out, err = self.run("sweep", "first.yaml", *overrides, "--json")
        status, _ = self.run("status", "first.yaml", "--json")
        return Snapshot(json.loads(out), err, json.loads(status), self.trainings(), tracked(self.storage))

    def trainings(self) -> list[Training]:
        ledger = Ledger.open_existing(self.storage / "first" / LEDGER_FILE)
        try:
            return ledger.trainings()
        finally:
            ledger.close()


@dataclass(frozen=True)
class Tracked:
    """What MLflow holds: the one parent, the children by training id, their artifacts and step metrics."""

    parent: Run
    parent_artifacts: set[str]
    children: dict[str, Run]
    artifacts: dict[str, set[str]]
    steps: dict[str, dict[str, list[int]]]


@dataclass(frozen=True)
class Snapshot:
    """How things stand after one start."""

    fronts: dict[str, Any]
    messages: str
    status: dict[str, Any]
    trainings: list[Training]
    tracked: Tracked

    @property
    def front(self) -> list[dict[str, Any]]:
        (study,) = self.fronts["fronts"]
        return study["trainings"]


def tracked(storage: Path) -> Tracked:
    client = MlflowClient(tracking_uri=f"sqlite:///{storage}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("first").experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {run.data.tags["qk.training_id"]: run for run in runs if run is not parent}
    assert len(children) == len(runs) - 1, "a training has two runs"
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {parent.info.run_id}

    def files(run: Run, folder: str) -> set[str]:
        return {item.path for item in client.list_artifacts(run.info.run_id, folder)}

    def steps(run: Run, name: str) -> list[int]:
        return [point.step for point in client.get_metric_history(run.info.run_id, name)]

    return Tracked(
        parent=parent,
        parent_artifacts=files(parent, "") | files(parent, "fronts"),
        children=children,
        artifacts={one: files(run, "dictionary") for one, run in children.items()},
        steps={one: {name: steps(run, name) for name in ("loss", "kl", "top1")} for one, run in children.items()},
    )


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return Sweep.create(tmp_path_factory.mktemp("system") / "first")


@pytest.fixture(scope="module")
def first(sweep: Sweep) -> Snapshot:
    """From nothing."""
    return sweep.sweep()


@pytest.fixture(scope="module")
def second(sweep: Sweep, first: Snapshot) -> Snapshot:
    """The same file again, after what a driver leaves that was killed once all was trained."""
    (sweep.storage / "first" / ".tune").mkdir()
    return sweep.sweep()


@pytest.fixture(scope="module")
def larger(sweep: Sweep, second: Snapshot) -> Snapshot:
    """A grid with one more point."""
    return sweep.sweep(*LARGER_GRID)


def brute_force_front(trainings: list[Training]) -> list[str]:
    """Feasible trainings that no other one beats, by ascending l0."""

    def point(training: Training) -> tuple[float, float]:
        return training.metrics["l0"], training.metrics["kl"]

    inside = [
        one
        for one in trainings
        if one.metrics["kl_recovered"] >= 0.5 and 1 <= one.metrics["l0"] <= one.hyperparameters["dictionary_size"] / 4
    ]

    def beats(one: Training, other: Training) -> bool:
        return point(one) != point(other) and all(a <= b for a, b in zip(point(one), point(other), strict=True))

    best = [one for one in inside if not any(beats(other, one) for other in inside)]
    return [one.training_id for one in sorted(best, key=point)]


def test_a_sweep_trains_everything_that_its_file_asks_for(first: Snapshot) -> None:
    assert first.status["trainings"] == {"open": 0, "running": 0, "finished": 2, "stopped": 0, "failed": 0}
    assert (first.status["tokens_done"], first.status["tokens_planned"]) == (2 * TOKENS, 2 * TOKENS)
    (study,) = first.status["studies"]
    assert (study["layer"], study["trainings"], study["tokens_done"]) == (1, first.status["trainings"], 2 * TOKENS)
    assert [one.hyperparameters["dictionary_size"] for one in first.trainings] == [128, 256]
    assert {(one.attempts, one.error, one.tokens_done) for one in first.trainings} == {(1, None, TOKENS)}


def test_fronts_name_what_was_found(sweep: Sweep, first: Snapshot) -> None:
    (study,) = first.fronts["fronts"]
    assert study["layer"] == 1 and study["hypervolume"] > 0
    # rounding activations to bfloat16 costs less than a hundredth of what is left to explain
    assert 0 < study["kl_cache"] < 0.01 * min(one["kl"] for one in first.front)
    assert [one["training_id"] for one in first.front] == brute_force_front(first.trainings) != []
    by_id = {one.training_id: one for one in first.trainings}
    for member in first.front:
        training = by_id[member["training_id"]]
        assert member["hyperparameters"] == training.hyperparameters
        names = ("kl", "kl_recovered", "l0_query", "l0_key", "l0", "top1")
        assert {name: member[name] for name in names} == {name: training.metrics[name] for name in names}
        assert member["kl_recovered"] == 1 - member["kl"] / study["kl_baseline"]
        assert member["l0"] == (member["l0_query"] + member["l0_key"]) / 2 == 8
        assert Path(member["dictionary"]).is_relative_to(sweep.storage)
    assert json.loads(sweep.run("fronts", str(sweep.storage / "first"), "--json")[0])["sweep"] == "first"


def test_nothing_is_left_to_do_the_second_time(sweep: Sweep, first: Snapshot, second: Snapshot) -> None:
    assert "nothing left to do" in second.messages and "nothing left to do" not in first.messages
    assert second.trainings == first.trainings
    assert (second.fronts, second.status) == (first.fronts, first.status)
    assert second.tracked.steps == first.tracked.steps
    assert not (sweep.storage / "first" / ".tune").exists()


def test_mlflow_holds_a_parent_and_a_child_per_training(first: Snapshot) -> None:
    found, by_id = first.tracked, {one.training_id: one for one in first.trainings}
    assert (found.parent.info.run_name, found.parent.info.status) == ("first", "FINISHED")
    assert {"sweep.yaml", "fronts/L01.png", "fronts/L01.html", "fronts/L01.json"} <= found.parent_artifacts
    assert first.status["owed"]["anything"] is False
    assert found.children.keys() == by_id.keys()
    for identifier, run in found.children.items():
        training = by_id[identifier]
        assert run.info.status == "FINISHED"
        study = {
            "layer": 1,
            "model": "smollm2-135m",
            "corpus": "sotu",
            "context": 128,
            "tokens": TOKENS,
            "sweep_seed": 0,
        }
        params = study | training.hyperparameters
        assert run.data.params == {name: str(value) for name, value in params.items()}
        final = {name: value for name, value in training.metrics.items() if value is not None}
        assert {name: run.data.metrics.get(shown_name(name)) for name in final} == final
        before_the_end = list(range(REPORT_TOKENS, TOKENS, REPORT_TOKENS))
        assert found.steps[identifier] == {
            "loss": before_the_end,
            "kl": [*before_the_end, TOKENS],
            "top1": [TOKENS],
        }


def test_dictionaries_and_tags_are_those_of_front_members(first: Snapshot) -> None:
    members = {one["training_id"] for one in first.front}
    files = {f"dictionary/{name}" for name in ("config.json", "transcoder.safetensors", "attention.safetensors")}
    for identifier, run in first.tracked.children.items():
        assert first.tracked.artifacts[identifier] == (files if identifier in members else set())
        assert run.data.tags.get("pareto") == ("true" if identifier in members else None)


EVALUATE = """
import json, sys
from pathlib import Path
import torch
from qkmodel.activations import ActivationCache
from qkmodel.dictionary import load_dictionary
from qkmodel.evaluation import evaluate
from qkmodel.reference import load_reference, reference_path

torch.set_num_threads(1)  # as in the sweep: other thread counts may round otherwise
cache = ActivationCache.open(Path(sys.argv[1]))
answers = {}
for folder, sha256 in json.loads(sys.argv[2]).items():
    dictionary = load_dictionary(folder, sha256)
    training = dictionary.config.training
    _, reference = load_reference(reference_path(cache, dictionary.config.model.layer, training))
    (answers[dictionary.config.training_id],) = evaluate(
        [dictionary.transcoder], dictionary.attention, cache, reference, training.validation_sequences
    )
print(json.dumps(answers))
"""


def test_a_dictionary_gives_the_recorded_metrics_in_a_fresh_process(sweep: Sweep, first: Snapshot) -> None:
    (manifest,) = (sweep.storage / "activations").glob("*/manifest.json")
    folders = {str(sweep.storage / "first" / one.dictionary): one.dictionary_sha256 for one in first.trainings}
    command = [sys.executable, "-c", EVALUATE, str(manifest.parent), json.dumps(folders)]
    answers = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    for training in first.trainings:
        recorded = {name: value for name, value in training.metrics.items() if not name.startswith("ce_")}
        assert answers[training.training_id] == recorded
        assert len(recorded) == len(training.metrics) - 4


def test_an_explanation_adds_up_to_the_score_and_p_is_the_models(sweep: Sweep, first: Snapshot) -> None:
    dictionary = sweep.storage / "first" / first.trainings[0].dictionary
    asked = ("--head", str(HEAD), "--prompt", PROMPT, "--pairs", "100000", "--json")
    record = json.loads(sweep.run("explain", str(dictionary), *asked)[0])
    loaded = load_dictionary(dictionary)
    model = load_language_model(ModelConfig(name="smollm2-135m"))
    text = (loaded.config.corpus.bos or "") + PROMPT
    tokens = model.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    assert "".join(record["tokens"]) == text
    layer = loaded.config.geometry.layer
    p = model.attention_pattern(tokens, layer)[0, HEAD]
    x = model.attention_inputs(tokens, [layer])[layer]
    q_hat, k_hat = (y.unflatten(-1, (-1, loaded.config.geometry.d_head)) for y in loaded.transcoder(x))
    with torch.no_grad():
        scores = loaded.attention.scores(q_hat, k_hat)[0, HEAD]
    assert len(record["looks"]) == 2 * tokens.shape[1] - 1
    for look in record["looks"]:
        where = look["query"], look["key"]
        assert look["p"] == pytest.approx(p[where].item(), abs=1e-5)
        assert look["score"] == pytest.approx(scores[where].item(), abs=1e-4)
        assert look["others"] == pytest.approx(0, abs=1e-4), "all pairs were asked for"
        added = look["bias"] + sum(pair["contribution"] for pair in look["pairs"])
        assert added == pytest.approx(look["score"], abs=1e-4)


@pytest.mark.parametrize(
    ("head", "prompt", "said"), [("9", "x", "--head: 9 is not there; layer"), ("0", " ", "--prompt: is empty")]
)
def test_what_cannot_be_explained_is_one_line(sweep: Sweep, first: Snapshot, head: str, prompt: str, said: str) -> None:
    dictionary = sweep.storage / "first" / first.trainings[0].dictionary
    done = orchestrate("explain", str(dictionary), "--head", head, "--prompt", prompt, cwd=sweep.folder)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and said in done.stderr


def test_a_larger_grid_trains_only_the_missing_point(second: Snapshot, larger: Snapshot) -> None:
    assert larger.trainings[:2] == second.trainings
    assert [one.hyperparameters["dictionary_size"] for one in larger.trainings] == [128, 256, 512]
    assert larger.status["trainings"] == {"open": 0, "running": 0, "finished": 3, "stopped": 0, "failed": 0}
    front = brute_force_front(larger.trainings)
    assert [one["training_id"] for one in larger.front] == front
    tagged = [one for one, run in larger.tracked.children.items() if run.data.tags.get("pareto") == "true"]
    assert sorted(tagged) == sorted(front)


def test_a_smaller_grid_has_nothing_left_to_do(sweep: Sweep, larger: Snapshot) -> None:
    smaller = sweep.sweep("search.space.dictionary_size=128", "search.trainings=1")
    assert "nothing left to do" in smaller.messages
    assert smaller.trainings == larger.trainings


@pytest.mark.slow
def test_an_interrupted_and_killed_sweep_ends_with_the_same_bytes_as_an_undisturbed_one(tmp_path: Path) -> None:
    length = {"tokens": 16_384, "report_tokens": 1024}
    whole, killed = Sweep.create(tmp_path / "whole", **length), Sweep.create(tmp_path / "killed", **length)
    undisturbed = whole.sweep()
    # the activations are the same whoever computes them, and take most of the time
    shutil.copytree(whole.storage / "activations", killed.storage / "activations")

    with killed.started("sweep", "first.yaml") as (process, output):
        wait_until_training(killed, process, output)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=300) == 130, (output / "err").read_text()
        assert {one.state for one in killed.trainings()} == {"open"}
        assert tracked(killed.storage).parent.info.status == "KILLED"

    with killed.started("sweep", "first.yaml") as (process, output):
        wait_until_training(killed, process, output)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        left = killed.trainings()
        assert {one.state for one in left} == {"running"}
        assert all(0 < one.tokens_done < 16_384 for one in left)
        # Ray's workers may outlive the driver for a moment: as after a real kill, nobody waits for them
        continued = killed.sweep()

    assert continued.status["trainings"] == {"open": 0, "running": 0, "finished": 2, "stopped": 0, "failed": 0}
    assert [one.attempts for one in continued.trainings] == [3, 3]
    assert [one.metrics for one in continued.trainings] == [one.metrics for one in undisturbed.trainings]
    for one, other in zip(undisturbed.trainings, continued.trainings, strict=True):
        bytes_of_one = (whole.storage / "first" / one.dictionary / "transcoder.safetensors").read_bytes()
        assert bytes_of_one == (killed.storage / "first" / other.dictionary / "transcoder.safetensors").read_bytes()
    # every report is there once, those too that a kill came between their checkpoint and their booking
    assert continued.tracked.steps == undisturbed.tracked.steps


def wait_until_training(sweep: Sweep, process: subprocess.Popen[str], output: Path) -> None:
    """Until `status` shows a running training that has reported."""
    path = sweep.storage / "first" / LEDGER_FILE
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, (output / "err").read_text()
        time.sleep(0.1)
        if not path.is_file():
            continue
        # until the sweep is recorded there is none
        with contextlib.suppress(InputError):
            ledger = Ledger.open_existing(path)
            status = status_record(ledger)
            ledger.close()
            if status["trainings"]["running"] and status["tokens_done"]:
                return
    raise TimeoutError("no training reported within 300 s")
