"""A language model, an activation cache and a layer, all real and all small."""

from dataclasses import dataclass
from pathlib import Path

import torch

from qkmodel.activation_build import build_activation_cache
from qkmodel.activations import ActivationCache, CacheKey
from qkmodel.attention import AttentionLayer
from qkmodel.configs import TrainingConfig
from qkmodel.corpus import TokenisedCorpus
from qkmodel.language_model import LanguageModel
from qkmodel.reference import LayerReference, ensure_reference
from tests.qkmodel.random_models import CONFIGS, VOCABULARY, random_hf_model, wrap

CONTEXT = 12
LAYER = 1


@dataclass(frozen=True)
class SmallWorld:
    """Layer 1 of a random-weight model whose cache holds 192 training and 64 validation sequences."""

    model: LanguageModel
    cache: ActivationCache
    layer: AttentionLayer
    reference: LayerReference
    training: TrainingConfig


def make_world(folder: Path, family: str = "llama3") -> SmallWorld:
    model = wrap(random_hf_model(CONFIGS[family]))
    generator = torch.Generator().manual_seed(0)

    def corpus(train: int, validation: int) -> TokenisedCorpus:
        tokens = torch.randint(VOCABULARY, (train + validation, CONTEXT), generator=generator, dtype=torch.int32)
        tokens[:, 0] = 1
        return TokenisedCorpus(tokens[:train], tokens[train:], "b", 1, 1, 1, None, None)

    training = TrainingConfig(
        tokens=192 * CONTEXT, batch_sequences=4, validation_sequences=19, cross_entropy_sequences=5
    )
    cache = build_activation_cache(
        folder,
        CacheKey(
            weights_sha256="w",
            tokenizer_sha256="t",
            corpus_sha256="c",
            bos="b",
            context=CONTEXT,
            seed=0,
            validation_documents=0.5,
            dtype="bfloat16",
            products="bfloat16",
            d_model=model.description.d_model,
        ),
        layers=[LAYER],
        train_sequences=192,
        validation_sequences=training.validation_sequences,
        max_bytes=10**9,
        model_loader=lambda: model,
        corpus_loader=corpus,
    )
    layer, reference = ensure_reference(cache, LAYER, training, lambda: model)
    return SmallWorld(model, cache, layer, reference, training)
