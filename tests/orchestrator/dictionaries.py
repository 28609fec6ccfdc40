"""Sweeps whose ledgers hold dictionaries of random weights: real files, nothing trained."""

from collections.abc import Mapping
from pathlib import Path

import torch

from orchestrator.ledger import Ledger
from orchestrator.ledger_file import LEDGER_FILE
from qkmodel.configs import CorpusConfig, ModelConfig, TrainingConfig
from qkmodel.dictionary import CorpusIdentity, DictionaryConfig, ModelIdentity, save_dictionary
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.transcoder import initialise_qk_transcoder
from tests.qkmodel.layers import random_layer

IDENTITY = {"corpus": {"context": 12}, "training": {"tokens": 1000}, "seed": 3}
# training id -> l0, kl; kl_baseline is 2
FRONT = {"aaaa000000000001": (8.0, 0.5), "bbbb000000000002": (16.5, 0.15), "cccc000000000003": (60.0, 0.125)}


def make_sweep(
    storage: Path,
    name: str = "small",
    fronts: Mapping[int, Mapping[str, tuple[float, float]]] | None = None,
    tracking: str | None = None,
) -> Ledger:
    """A finished sweep in `storage`: a study per layer, whose trainings have dictionaries of their own."""
    fronts = {8: FRONT} if fronts is None else fronts
    ledger = Ledger(storage / name / LEDGER_FILE)
    ledger.open_sweep(name, {"name": name, "tracking": tracking}, "abc123", {"torch": torch.__version__})
    for layer, front in fronts.items():
        study = f"study-{layer}"
        ledger.open_study(study, "transcoder", layer, IDENTITY, model="smollm2-135m", corpus="sotu")
        ledger.set_reference(study, {"kl_baseline": 2.0, "kl_cache": 1e-5, "l0_cap": 128.0})
        for number, (training_id, (l0, kl)) in enumerate(front.items()):
            add_finished(ledger, study, layer, training_id, seed=number, l0=l0, kl=kl)
    ledger.set_current({f"study-{layer}": 1000 * len(front) for layer, front in fronts.items()})
    return ledger


def add_finished(ledger: Ledger, study: str, layer: int, training_id: str, *, seed: int, l0: float, kl: float) -> None:
    hyperparameters = Hyperparameters(dictionary_size=512, activation="topk", k=16, learning_rate=3e-3, seed=seed)
    metrics = {"kl": kl, "l0": l0, "kl_recovered": 1 - kl / 2, "kl_head_00": kl, "ce_recovered": None}
    metrics |= {"kl_no_bos": kl * 1.1, "kl_recovered_no_bos": 1 - kl * 1.1 / 2, "top1": 1 / 3}
    attention = random_layer(layer=layer, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    d_model, d_query, d_key = attention.geometry.d_model, 64, 32
    means = [torch.randn(size, generator=generator) for size in (d_model, d_query, d_key)]
    config = DictionaryConfig(
        training_id=training_id,
        model=ModelIdentity(
            config=ModelConfig(name="smollm2-135m"), weights_sha256="fe" * 32, layer=layer, hook=f"blocks.{layer}"
        ),
        geometry=attention.geometry,
        corpus=CorpusIdentity(config=CorpusConfig(name="sotu"), bos="<|endoftext|>", sha256="c0" * 32),
        training=TrainingConfig(tokens=1000, validation_sequences=16),
        sweep_seed=3,
        hyperparameters=hyperparameters,
        metrics=metrics,
        versions={"torch": torch.__version__},
        git_sha="abc123",
    )
    path = f"dictionaries/{training_id}-0001"
    transcoder = initialise_qk_transcoder(hyperparameters, attention, *means, 1.0)
    sha256 = save_dictionary(ledger.folder / path, transcoder, attention, config)
    ledger.add_training(study, training_id, hyperparameters.model_dump(exclude_none=True), 1000)
    ledger.start(training_id, "pack-0001", {})
    ledger.finish(training_id, metrics, path, sha256)
