"""A dictionary of a real sweep is chosen, loaded by name in a fresh process, and measures what was recorded."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.system.test_first_sweep import Sweep

pytestmark = pytest.mark.system

# what `choose` prints stands before it
EVALUATE = """
import json, sys
from pathlib import Path
import torch
from qkmodel.activations import ActivationCache
from qkmodel.evaluation import evaluate
from qkmodel.reference import load_reference, reference_path

torch.set_num_threads(1)  # as in the sweep: other thread counts may round otherwise
cache = ActivationCache.open(Path(sys.argv[1]))
training = dictionary.config.training
_, reference = load_reference(reference_path(cache, dictionary.config.model.layer, training))
(metrics,) = evaluate([dictionary.transcoder], dictionary.attention, cache, reference, training.validation_sequences)
print(json.dumps(metrics))
"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    sweep = Sweep.create(tmp_path_factory.mktemp("choosing") / "sweep")
    sweep.run("sweep", "first.yaml")
    return sweep


def measured(sweep: Sweep, python: str) -> dict[str, float | None]:
    """What a fresh process measures of the dictionary that a line of Python loads, in another folder."""
    (manifest,) = (sweep.storage / "activations").glob("*/manifest.json")
    command = [sys.executable, "-c", f"{python}\n{EVALUATE}", str(manifest.parent)]
    return json.loads(subprocess.run(command, cwd="/", capture_output=True, text=True, check=True).stdout)


def recorded(sweep: Sweep, training_id: str) -> dict[str, float | None]:
    """All that is measured without the language model."""
    (training,) = (one for one in sweep.trainings() if one.training_id == training_id)
    return {name: value for name, value in training.metrics.items() if not name.startswith("ce_")}


def choose(sweep: Sweep, *arguments: str) -> dict[str, Any]:
    (chosen,) = json.loads(sweep.run("choose", "first.yaml", *arguments, "--json")[0])["chosen"]
    return chosen


def test_a_chosen_dictionary_measures_what_was_recorded(sweep: Sweep) -> None:
    line, said = sweep.run("choose", "first")
    assert line.startswith('from orchestrator import load_dictionary; dictionary = load_dictionary("models:/qk.smollm2')
    assert said.startswith("models:/qk.smollm2-135m.L01@knee is L01 topk8 d") and said.count("\n") == 1
    again = choose(sweep)
    assert (again["version"], again["is_new"], again["python"]) == ("1", False, line.strip())
    assert measured(sweep, line) == recorded(sweep, again["training_id"])


def test_an_exported_dictionary_measures_what_was_recorded(sweep: Sweep) -> None:
    training_id = choose(sweep, "--rule", "l0=8")["training_id"]
    sweep.run("export", "first", "--rule", "l0=8", "--output", "hub")
    folder = sweep.folder / "hub"
    python = f"from qkmodel import load_dictionary; dictionary = load_dictionary({str(folder)!r})"
    assert measured(sweep, python) == recorded(sweep, training_id)
    assert f"`{training_id}`" in (folder / "README.md").read_text()


def test_a_rule_that_nothing_meets_registers_nothing(sweep: Sweep) -> None:
    with sweep.started("choose", "first", "--rule", "kl_recovered>=0.9999") as (process, output):
        assert process.wait(timeout=300) == 2
    said = (output / "err").read_text()
    assert said.startswith("error: layer 1: no training on the front has kl_recovered ≥ 0.9999; it offers l0 8 to 8")
    assert said.count("\n") == 1 and (output / "out").read_text() == ""


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_a_dictionary_that_was_changed_in_the_store_is_refused(sweep: Sweep, damage: str) -> None:
    chosen = choose(sweep)
    for weights in (sweep.storage / "mlflow-artifacts").glob("first/models/*/artifacts/transcoder.safetensors"):
        content = weights.read_bytes()
        weights.write_bytes(content[:-4] if damage == "truncated" else content[:-4] + b"\0\0\0\0")
        ran = _load(chosen["python"])
        weights.write_bytes(content)
    assert ran.returncode != 0
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith(f"qkmodel.errors.InputError: {chosen['reference']}: transcoder.safetensors: hash differs")
    assert _load(chosen["python"]).returncode == 0


def _load(python: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", python], cwd=Path("/"), capture_output=True, text=True, check=False)
