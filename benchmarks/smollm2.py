"""What several benchmarks begin with: activations of SmolLM2 on the bundled text."""

from collections.abc import Sequence
from pathlib import Path

from qkmodel.activation_build import build_activation_cache
from qkmodel.activations import ActivationCache, CacheKey
from qkmodel.configs import CorpusConfig, ModelConfig, TrainingConfig
from qkmodel.corpus import tokenise
from qkmodel.documents import describe_corpus
from qkmodel.language_model import LanguageModel, load_language_model
from qkmodel.products import forward_products

CORPUS = CorpusConfig(name="sotu", context=128, bos="<|endoftext|>")


def load_smollm2() -> LanguageModel:
    return load_language_model(ModelConfig(name="smollm2-135m"))


def build_cache(model: LanguageModel, layers: Sequence[int], training: TrainingConfig, folder: Path) -> ActivationCache:
    """The sequences of one epoch of `training`, and those it is validated on."""
    corpus = describe_corpus(CORPUS)
    key = CacheKey(
        weights_sha256=model.description.weights_sha256,
        tokenizer_sha256=model.description.tokenizer_sha256,
        corpus_sha256=corpus.sha256,
        bos=CORPUS.bos,
        context=CORPUS.context,
        seed=0,
        validation_documents=CORPUS.validation_documents,
        dtype="bfloat16",
        products=forward_products("bfloat16"),
        d_model=model.description.d_model,
    )
    tokens_per_step = training.batch_sequences * CORPUS.context
    return build_activation_cache(
        folder,
        key,
        layers=layers,
        train_sequences=-(-training.tokens // tokens_per_step) * training.batch_sequences,
        validation_sequences=training.validation_sequences,
        max_bytes=10**10,
        model_loader=lambda: model,
        corpus_loader=lambda train, validation: tokenise(
            CORPUS, model.tokenizer, seed=0, bos=CORPUS.bos, train_sequences=train, validation_sequences=validation
        ),
    )
