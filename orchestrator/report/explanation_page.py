"""`orchestrate explain --output`: one HTML page on a head, a text, and the pairs of features between its tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from orchestrator.explanation import TokenTexts
from orchestrator.report.corpus_cache import cache_of_dictionary
from orchestrator.storage.opened import local_root, open_storage
from qkmodel.activations import ActivationCache
from qkmodel.dictionary import Dictionary
from qkmodel.errors import InputError
from qkmodel.files import write_atomically
from qkmodel.pair_mask.contexts import Context, top_contexts
from qkmodel.pair_mask.explanation import HeadExplanation

# a page shows so many pairs with contexts, those of the largest contributions, and so many contexts of each
MOST_PAIRS, CONTEXTS = 12, 3
# tokens shown before and behind either place at which a pair meets
BEFORE, BEHIND = 10, 4
VALIDATION_SEQUENCES = 200


@dataclass(frozen=True)
class ShadedToken:
    """A token of a context; activations are shares of the largest in it."""

    text: str
    query: float
    key: float
    is_query: bool
    is_key: bool


@dataclass(frozen=True)
class PairContexts:
    """One pair of features: its largest contribution on the page, and where it meets in the corpus."""

    query_feature: int
    key_feature: int
    contribution: float
    contexts: list[list[ShadedToken]]


def write_explanation(
    output: Path,
    dictionary: Dictionary,
    found: HeadExplanation,
    tokens: Sequence[str],
    texts: TokenTexts,
    storage: str,
) -> list[str]:
    """Writes the page, to a place that `require_place` took; returns what it leaves out, in lines.

    `storage` is a folder or the address of a bucket, as in a sweep file.
    """
    pairs, left_out = _largest_pairs(found), []
    try:
        sequences = _searched(dictionary)
        cache = cache_of_dictionary(local_root(storage), dictionary.config, sequences, open_storage(storage))
        contexts = _contexts(dictionary, cache, list(pairs), texts)
    except InputError as error:
        contexts = {pair: [] for pair in pairs}
        left_out.append(f"where pairs meet in the corpus is left out: {error}")
    shown = [PairContexts(*pair, contribution, contexts[pair]) for pair, contribution in pairs.items()]
    environment = Environment(
        loader=PackageLoader("orchestrator.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("explanation.html.jinja").render(
        config=dictionary.config,
        # counted, since metrics are what anybody may have edited
        kept=None if dictionary.kept_pairs is None else len(dictionary.kept_pairs.pairs),
        found=found,
        tokens=tokens,
        pairs=shown,
        left_out=left_out,
        style=Markup(environment.loader.get_source(environment, "page.css")[0]),
    )
    write_atomically(output.absolute(), page.encode())
    return left_out


def _largest_pairs(found: HeadExplanation) -> dict[tuple[int, int], float]:
    """The pairs of the largest contributions to any score that is shown, with these."""
    largest: dict[tuple[int, int], float] = {}
    for one in (pair for look in found.looks for pair in look.pairs):
        if abs(one.contribution) > abs(largest.get(one.features, 0.0)):
            largest[one.features] = one.contribution
    chosen = sorted(largest, key=lambda pair: (-abs(largest[pair]), pair))[:MOST_PAIRS]
    return {pair: largest[pair] for pair in chosen}


def _contexts(
    dictionary: Dictionary, cache: ActivationCache, pairs: list[tuple[int, int]], texts: TokenTexts
) -> dict[tuple[int, int], list[list[ShadedToken]]]:
    found = top_contexts(dictionary.transcoder, dictionary.attention, _sequences(dictionary, cache), pairs, CONTEXTS)
    return {pair: [_shaded(one, cache, texts) for one in contexts] for pair, contexts in found.items()}


def _searched(dictionary: Dictionary) -> int:
    """How many validation sequences are searched for contexts."""
    config = dictionary.config
    training = config.training if config.pair_mask is None else config.pair_mask.training
    return min(VALIDATION_SEQUENCES, training.validation_sequences)


def _sequences(
    dictionary: Dictionary, cache: ActivationCache
) -> Iterator[tuple[int, Float[Tensor, "context d_model"]]]:
    for number in range(_searched(dictionary)):
        yield number, cache.read(dictionary.config.model.layer, "validation", [number])[0]


def _shaded(context: Context, cache: ActivationCache, texts: TokenTexts) -> list[ShadedToken]:
    """The tokens around the place of the key and around that of the query, with … between where they are far apart."""
    words = [text.replace("\n", "↵") for text in texts(cache.tokens("validation", [context.sequence])[0].tolist())]
    query, key = (values / values.max() for values in (context.query_activations, context.key_activations))
    near = {place + step for place in (context.key, context.query) for step in range(-BEFORE, BEHIND + 1)}
    places = sorted(place for place in near if 0 <= place < len(words))
    shown: list[ShadedToken] = []
    for before, place in zip([places[0], *places], places, strict=False):
        if place > before + 1:
            shown.append(ShadedToken(" … ", 0.0, 0.0, False, False))
        is_query, is_key = place == context.query, place == context.key
        shown.append(ShadedToken(words[place], query[place].item(), key[place].item(), is_query, is_key))
    return shown
