"""What a report shows of one dictionary on held-out text: activity of its features, patterns beside the model's own."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from orchestrator.ledger_records import Study, Training
from orchestrator.report.corpus_cache import cache_of_study
from orchestrator.report.token_texts import TokenTexts
from orchestrator.storage.shared import SHARED, Storage
from qkmodel.activations import ActivationCache
from qkmodel.dictionary import Dictionary, load_dictionary
from qkmodel.feature_activity import FeatureActivity, feature_activity
from qkmodel.pattern_comparison import evaluation_batch

SENTENCES = 3
MOST_TOKENS = 40
# what the patterns of all studies together may take in the page
_PATTERN_BYTES = 2_000_000


@dataclass(frozen=True)
class Sentence:
    """The first tokens of a validation sequence, and the attention among them: what comes later changes nothing.

    Patterns are [head, query, key].
    """

    number: int
    tokens: list[str]
    pattern: Float[Tensor, "n_heads token token"]
    reconstructed: Float[Tensor, "n_heads token token"]


@dataclass(frozen=True)
class DictionaryFacts:
    """One dictionary on validation sequences. `activity` by side; `heads` of the layer."""

    heads: int
    activity: dict[str, FeatureActivity]
    sentences: list[Sentence]


def examine(
    sweep_folder: Path,
    study: Study,
    training: Training,
    studies: int,
    texts: TokenTexts,
    storage: Storage = SHARED,
) -> DictionaryFacts:
    """Loads a finished training's dictionary by the ledger's hash and runs it over the study's cached sequences.

    `studies` share the room for patterns in the page. Raises InputError when the dictionary or the activations are
    gone or damaged.
    """
    storage.fetch(sweep_folder / training.dictionary)
    dictionary = load_dictionary(sweep_folder / training.dictionary, training.dictionary_sha256)
    cache = cache_of_study(sweep_folder.parent, study, storage)
    geometry = dictionary.config.geometry
    sequences = range(min(SENTENCES, dictionary.config.training.validation_sequences))
    shown = min(cache.context, tokens_that_fit(geometry.n_heads, studies))
    x = cache.read(study.layer, "validation", sequences)[:, :shown]
    with torch.no_grad():
        pattern = dictionary.attention.pattern(*dictionary.attention.project(x))
    reconstructed = dictionary.pattern(x)
    tokens = cache.tokens("validation", sequences)[:, :shown].tolist()
    sentences = [
        Sentence(number, texts.of(dictionary.config.model.config, study, tokens[number]), *patterns)
        for number, patterns in zip(sequences, zip(pattern, reconstructed, strict=True), strict=True)
    ]
    activity = feature_activity(dictionary.transcoder, _batches(cache, dictionary))
    return DictionaryFacts(geometry.n_heads, activity, sentences)


def tokens_that_fit(n_heads: int, studies: int) -> int:
    """Tokens of each sentence, so that all patterns together stay within `_PATTERN_BYTES`; two at least."""
    # two patterns of two bytes an entry, in base64
    entry = SENTENCES * n_heads * max(1, studies) * 2 * 2 * 4 / 3
    return next((n for n in range(MOST_TOKENS, 2, -1) if entry * n * (n + 1) / 2 <= _PATTERN_BYTES), 2)


def _batches(cache: ActivationCache, dictionary: Dictionary) -> Iterator[Float[Tensor, "batch context d_model"]]:
    count, size = dictionary.config.training.validation_sequences, evaluation_batch(cache.context)
    for start in range(0, count, size):
        numbers = range(start, min(start + size, count))
        yield cache.read(dictionary.config.model.layer, "validation", numbers)
