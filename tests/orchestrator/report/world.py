"""A sweep folder, all real and small: model, tokenizer, text that is markup, cache, dictionaries, ledger."""

import random
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from orchestrator.identity import study_identity
from orchestrator.ledger import Ledger
from orchestrator.ledger_file import LEDGER_FILE
from qkmodel.activation_build import build_activation_cache
from qkmodel.activations import ActivationCache, CacheKey
from qkmodel.attention import AttentionLayer
from qkmodel.configs import CorpusConfig, ModelConfig, TrainingConfig
from qkmodel.corpus import tokenise
from qkmodel.dictionary import CorpusIdentity, DictionaryConfig, ModelIdentity, save_dictionary
from qkmodel.documents import describe_corpus
from qkmodel.evaluation import evaluate
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.language_model import LanguageModel, load_language_model
from qkmodel.reference import LayerReference, ensure_reference
from qkmodel.transcoder import initialise_qk_transcoder
from tests.qkmodel.random_models import CONFIGS, random_hf_model

LAYER = 1
STUDY = "0123456789abcdef"
MARKUP = ("<script>hacked=1</script>", "</script>", "<!--", "<b>&amp;", "'\"><img/src/onerror=hacked=1>", "]]>")
WORDS = (*MARKUP, "the", "query", "looks", "back")
# id -> k of its dictionary, and the kl that the ledger is told, so that there is a front: three on it, one beaten
TRAININGS = {"sparse": (2, 0.9), "middle": (4, 0.3), "dense": (8, 0.25), "beaten": (8, 0.5)}
TRAINING = TrainingConfig(tokens=192, batch_sequences=4, validation_sequences=9, cross_entropy_sequences=0)


@dataclass(frozen=True)
class ReportWorld:
    """`<storage>/small` is the sweep's folder; the model lies in `<storage>/../model`."""

    ledger: Ledger
    cache: ActivationCache
    layer: AttentionLayer
    model_folder: Path

    @property
    def folder(self) -> Path:
        return self.ledger.folder


def make_report_world(root: Path) -> ReportWorld:
    model_config, corpus = ModelConfig(name=str(_save_model(root / "model"))), _corpus(root / "text")
    model = load_language_model(model_config)
    cache = _cache(root / "runs" / "activations", model, corpus)
    layer, reference = ensure_reference(cache, LAYER, TRAINING, lambda: model)
    ledger = Ledger(root / "runs" / "small" / LEDGER_FILE)
    ledger.open_sweep("small", {}, None, {})
    identity = study_identity(
        task="transcoder",
        weights_sha256=model.description.weights_sha256,
        tokenizer_sha256=model.description.tokenizer_sha256,
        layer=LAYER,
        corpus=corpus,
        corpus_sha256=cache.manifest.key.corpus_sha256,
        bos="the",
        training=TRAINING,
        dtype="float32",
        seed=0,
    )
    ledger.open_study(STUDY, "transcoder", LAYER, identity, model="random", corpus="markup")
    ledger.set_reference(STUDY, {"kl_baseline": 2.0, "l0_cap": 16.0})
    ledger.set_current({STUDY: 1000})
    for training_id, (k, kl) in TRAININGS.items():
        _finish(ledger, training_id, k, kl, cache, layer, reference, model_config, corpus)
    return ReportWorld(ledger, cache, layer, root / "model")


def _save_model(folder: Path) -> Path:
    random_hf_model(CONFIGS["llama3"]).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="the"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def _corpus(folder: Path) -> CorpusConfig:
    folder.mkdir()
    for number in range(20):
        chosen = random.Random(number).choices(WORDS, k=60)
        (folder / f"{number:02d}.txt").write_text(" ".join(chosen))
    return CorpusConfig(name=str(folder), context=12, validation_documents=0.5, bos="the")


def _cache(root: Path, model: LanguageModel, corpus: CorpusConfig) -> ActivationCache:
    key = CacheKey(
        weights_sha256=model.description.weights_sha256,
        tokenizer_sha256=model.description.tokenizer_sha256,
        corpus_sha256=describe_corpus(corpus).sha256,
        bos="the",
        context=corpus.context,
        seed=0,
        validation_documents=corpus.validation_documents,
        dtype="float32",
        products="float32",
        d_model=model.description.d_model,
    )
    return build_activation_cache(
        root,
        key,
        layers=[LAYER],
        train_sequences=16,
        validation_sequences=TRAINING.validation_sequences,
        max_bytes=10**9,
        model_loader=lambda: model,
        corpus_loader=lambda train, validation: tokenise(
            corpus, model.tokenizer, seed=0, bos="the", train_sequences=train, validation_sequences=validation
        ),
    )


def _finish(
    ledger: Ledger,
    training_id: str,
    k: int,
    kl: float,
    cache: ActivationCache,
    layer: AttentionLayer,
    reference: LayerReference,
    model: ModelConfig,
    corpus: CorpusConfig,
) -> None:
    """A dictionary as it starts out, with its real metrics but for `kl` and `kl_recovered`."""
    hyperparameters = Hyperparameters(dictionary_size=64, activation="topk", k=k, learning_rate=1e-3)
    means = (reference.mean_input, reference.mean_query, reference.mean_key)
    transcoder = initialise_qk_transcoder(hyperparameters, layer, *means, reference.input_rms)
    (metrics,) = evaluate([transcoder], layer, cache, reference, TRAINING.validation_sequences)
    metrics |= {"kl": kl, "kl_recovered": 1 - kl / 2}
    config = DictionaryConfig(
        training_id=training_id,
        model=ModelIdentity(config=model, weights_sha256="w", layer=LAYER, hook="blocks.1.attn.hook_in"),
        geometry=layer.geometry,
        corpus=CorpusIdentity(config=corpus, bos="the", sha256="c"),
        training=TRAINING,
        sweep_seed=0,
        hyperparameters=hyperparameters,
        metrics=metrics,
        versions={},
        git_sha=None,
    )
    place = f"dictionaries/{training_id}-0001"
    sha256 = save_dictionary(ledger.folder / place, transcoder, layer, config)
    ledger.add_training(STUDY, training_id, hyperparameters.model_dump(mode="json") | {"seed": len(training_id)}, 192)
    ledger.report(training_id, 192, {}, seconds=1.0)
    ledger.finish(training_id, metrics, place, sha256)
