"""Why a head attends where it does, on a text of the user's: `orchestrate explain`."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from orchestrator.ledger_place import is_begun
from orchestrator.storage.address import is_bucket
from orchestrator.storage.opened import open_in_bucket
from orchestrator.storage_check import check_bucket
from qkmodel.corpus import token_id
from qkmodel.dictionary import Dictionary, load_dictionary
from qkmodel.errors import InputError
from qkmodel.language_model import LanguageModel, load_language_model
from qkmodel.pair_mask.explanation import Attended, HeadExplanation, explain_head
from qkmodel.tokenizer import token_texts

# token ids to texts
TokenTexts = Callable[[Sequence[int]], list[str]]


def open_dictionary(reference: str, tracking: str | None) -> Dictionary:
    """The dictionary in a folder or a bucket, or the one that `models:/…` names. Raises InputError as these do."""
    if is_bucket(reference):
        # in the storage's SWEEP/dictionaries/ID
        bucket, folder = open_in_bucket(reference, parts=3)
        check_bucket(bucket.url, is_written=False)
        bucket.fetch(folder)
        return load_dictionary(folder)
    if not reference.startswith("models:"):
        folder = Path(reference).absolute()
        if is_begun(folder):
            raise InputError(
                f"{reference}: is a sweep's folder; give one of those in its dictionaries/ (orchestrate fronts --json "
                "has the paths of those on fronts)"
            )
        return load_dictionary(folder)
    # takes seconds to import
    from orchestrator.registry import load_dictionary as load_registered

    return load_registered(reference, tracking)


def read_prompt(prompt: str | None, text: Path | None) -> str:
    """What was given on the command line, or stands in a file.

    Raises InputError where both or neither was, and for what is no text or only blanks.
    """
    if (prompt is None) == (text is None):
        raise InputError("--prompt: give the text, or --text with a file that holds it, and not both")
    found, where = (_of_whole_characters(prompt), "--prompt") if text is None else (_read(text), f"--text: {text}")
    if not found.strip():
        raise InputError(f"{where}: is empty; give some words")
    return found


def _read(text: Path) -> str:
    try:
        return text.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"--text: {text}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--text: {text}: is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _of_whole_characters(prompt: str) -> str:
    """Bytes of the command line that are not UTF-8 arrive as halves of characters, which no tokeniser takes."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"--prompt: is not UTF-8 text (at character {error.start})") from error
    return prompt


def explain(
    dictionary: Dictionary, head: int, prompt: str, keys: int, pairs: int
) -> tuple[HeadExplanation, Sequence[str], TokenTexts]:
    """What the dictionary says of one head on a prompt, the prompt's tokens, the opening one first, and how the model
    writes tokens.

    Raises InputError for a head that the layer does not have, a prompt that is too long, and a model that the
    dictionary does not fit or whose files are no longer those that it was trained on.
    """
    config = dictionary.config
    if head >= config.geometry.n_heads:
        raise InputError(
            f"--head: {head} is not there; layer {config.geometry.layer} has heads 0 to {config.geometry.n_heads - 1}"
        )
    # who wrote a dictionary cannot allow what only a user can
    harmless = config.model.config.model_copy(update={"trust_remote_code": False, "safetensors_only": True})
    kept = None if dictionary.kept_pairs is None else dictionary.kept_pairs.pairs
    model = load_language_model(harmless)
    if model.description.weights_sha256 != config.model.weights_sha256:
        raise InputError(f"model {config.model.config.name}: is not the one that the dictionary was trained on")
    layer = config.geometry.layer
    if layer >= model.description.n_layers:
        raise InputError(
            f"the dictionary is of layer {layer}; model {config.model.config.name} has layers 0 to "
            f"{model.description.n_layers - 1}"
        )
    if config.geometry.d_model != model.description.d_model:
        raise InputError(
            f"the dictionary reads {config.geometry.d_model} numbers a token; layers of model "
            f"{config.model.config.name} receive {model.description.d_model}"
        )
    tokens = _tokens(model, config.corpus.bos, prompt)
    x = model.attention_inputs(tokens, [layer])[layer][0]
    found = explain_head(dictionary.transcoder, dictionary.attention, x, head, keys, pairs, kept)
    return found, token_texts(model.tokenizer, tokens[0].tolist()), partial(token_texts, model.tokenizer)


def _tokens(model: LanguageModel, bos: str | None, prompt: str) -> Int64[Tensor, "1 context"]:
    """The prompt behind the token that opened the dictionary's sequences."""
    # by its number: in a text it might be spelled, or become one token with what follows
    opening = [] if bos is None else [token_id(model.tokenizer, bos)]
    tokens = [*opening, *model.tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids]
    longest = model.description.max_context
    if len(tokens) > longest:
        raise InputError(f"the text has {len(tokens)} tokens with the opening one; the model takes {longest}")
    return torch.tensor([tokens])


def explanation_record(found: HeadExplanation, tokens: Sequence[str]) -> dict[str, Any]:
    """What `orchestrate explain --json` prints."""
    return {"head": found.head, "tokens": list(tokens), "looks": [_look_record(look) for look in found.looks]}


def _look_record(look: Attended) -> dict[str, Any]:
    names = ("query", "key", "p", "p_hat", "score", "centred", "bias", "others", "left_out")
    pairs = [
        {"query_feature": one.query_feature, "key_feature": one.key_feature, "contribution": one.contribution}
        for one in look.pairs
    ]
    return {name: getattr(look, name) for name in names} | {"pairs": pairs}


def explanation_table(found: HeadExplanation, tokens: Sequence[str]) -> Table:
    """A row for each look: who looks at whom, how much, and the pairs behind it."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("from", justify="right", no_wrap=True)
    table.add_column("to", no_wrap=True)
    for name in ("p", "p̂", "score", "bias"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("query feature × key feature: contribution")
    for look in found.looks:
        pairs = [f"{one.query_feature}×{one.key_feature}: {one.contribution:+.2f}" for one in look.pairs]
        rest = [f"others: {look.others:+.2f}", *([f"not kept: {look.left_out:+.2f}"] if look.left_out else [])]
        table.add_row(
            Text(_shown(tokens, look.query)),
            Text(_shown(tokens, look.key)),
            f"{look.p:.2f}",
            f"{look.p_hat:.2f}",
            f"{look.score:+.2f}",
            f"{look.bias:+.2f}",
            ", ".join([*pairs, *rest]),
        )
    return table


def _shown(tokens: Sequence[str], position: int) -> str:
    return f"{position} {tokens[position]!r}"
