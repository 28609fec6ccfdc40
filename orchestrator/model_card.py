"""The model card of an exported dictionary: what it is, how good, where it comes from, how to load it."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from orchestrator.choice import Choice
from orchestrator.ledger_records import SweepRecord, Training
from qkmodel.dictionary import DictionaryConfig
from qkmodel.model_description import BUNDLED_MODELS

# owner/name, as hubs call models
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)
_BOTH_WAYS = ("kl", "kl_query", "kl_key", "kl_baseline", "kl_recovered")
_ONCE_OF_MASKS = (
    *("kl_masked", "kl_unmasked", "kl_no_pairs", "kl_baseline", "kl_masked_recovered", "mask_recovered"),
    *("pairs_kept", "pairs_share"),
    *("pairs_share_active", "pairs_for_90", "variance_share", "bias_share"),
    *("unpaired_query", "unpaired_key", "ce_recovered"),
)
_ONCE = ("l0", "l0_query", "l0_key", "top1", "max_error", "dead_query", "dead_key", "ce_recovered")
_FRONT_OF_MASKS = ("pairs_kept", "kl_masked", "kl_masked_recovered", "mask_recovered", "ce_recovered")
_FRONT = ("l0", "kl", "kl_recovered", "kl_recovered_no_bos", "top1", "ce_recovered")


def model_card(sweep: SweepRecord, choice: Choice, config: DictionaryConfig) -> str:
    """Markdown with YAML front matter. `config` is that of the dictionary that was chosen."""
    sections = [
        f"---\n{_front_matter(config)}\n---",
        f"# Query and key transcoders of {_code(config.model.config.name)}, layer {config.model.layer}",
        _what_it_is(config),
        *([] if config.pair_mask is None else [_what_is_kept(config)]),
        "## Metrics",
        *_metrics(config),
        "## The front it comes from",
        f"Chosen as {_code(choice.alias)} from {choice.status.counts['finished']:,} finished trainings, of which these "
        f"are Pareto-optimal in {_code(choice.training.objectives.kl)} and {choice.training.objectives.size_label}:",
        _table(("", *_front(choice.training), "training"), [_member(one, choice.training) for one in _shown(choice)]),
        "## How to load it",
        _how_to_load(choice.training),
        "## Where it comes from",
        _table(("", ""), _provenance(sweep, choice, config)),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(config: DictionaryConfig) -> str:
    name = config.model.config.name
    # the name of a local folder may look the same
    is_of_hub = name not in BUNDLED_MODELS and _HUB_NAME.fullmatch(name) is not None and not Path(name).is_dir()
    data = ModelCardData(
        base_model=name if is_of_hub else None,
        library_name="qkmodel",
        tags=["interpretability", "attention", "sparse-dictionary", "transcoder", "safetensors"],
    )
    return data.to_yaml().strip()


def _what_it_is(config: DictionaryConfig) -> str:
    opened = "with no opening token" if config.corpus.bos is None else f"opened by {_code(config.corpus.bos)}"
    sides = config.hyperparameters.query_side, config.hyperparameters.key_side
    features = " and ".join(f"{side.dictionary_size:,}" for side in sides)
    return (
        f"Two sparse dictionaries ({features} features, {_code(config.hyperparameters.activation)}) that read what "
        f"attention layer {config.model.layer} of {_code(config.model.config.name)} receives and write the layer's "
        "queries and keys, trained so that the attention pattern made from them equals the model's own (after "
        f"[Wynroe & Sharkey 2024](https://www.lesswrong.com/posts/2ep6FGjTQoGDRnhrq/)). {_trained_on(config)} "
        f"{_code(config.corpus.config.name)} in sequences of {config.corpus.config.context}, {opened}."
    )


def _trained_on(config: DictionaryConfig) -> str:
    if config.pair_mask is None:
        return f"Trained on {config.training.tokens:,} tokens of"
    # on which text the transcoders were is in the dictionary that they come from
    return f"Their pairs were chosen on {config.pair_mask.training.tokens:,} tokens of"


def _what_is_kept(config: DictionaryConfig) -> str:
    mask = config.pair_mask
    trained = "encoders and decoders" if mask.hyperparameters.encoders else "decoders"
    along = f"their {trained} trained along" if mask.hyperparameters.joint else "the transcoders unchanged"
    return (
        f"Of their pairs {config.metrics['pairs_kept']:,.0f} are kept ({config.metrics['pairs_share']:.2%} of all, "
        f"{_code('pairs.safetensors')}), {along}: a query feature and a key feature make a head attend only where "
        f"the pair is among that head's. They come from the dictionary {_code(mask.source_sha256)}"
        f"{', whose features are no longer the same' if mask.hyperparameters.encoders else ''}."
    )


def _metrics(config: DictionaryConfig) -> list[str]:
    if config.pair_mask is not None:
        rows = [(_code(name), _figure(config.metrics.get(name))) for name in _ONCE_OF_MASKS]
        return [_how_measured(config), _table(("", "value"), rows)]
    return [
        _how_measured(config),
        _table(("", "all positions", "without BOS"), [_both_ways(config, name) for name in _BOTH_WAYS]),
        _table(("", "value"), [(_code(name), _figure(config.metrics.get(name))) for name in _ONCE]),
    ]


def _front(training: Training) -> tuple[str, ...]:
    return _FRONT_OF_MASKS if training.task == "pair_mask" else _FRONT


def _how_measured(config: DictionaryConfig) -> str:
    training = config.training if config.pair_mask is None else config.pair_mask.training
    parts = [
        f"On {training.validation_sequences:,} held-out sequences of {config.corpus.config.context} tokens.",
        "KL is in nats, mean over heads and query positions.",
        "The baseline has the mean query and key at every position.",
    ]
    if config.pair_mask is None:
        parts.append("*Without BOS* leaves the first key position out; *recovered* is 1 − KL / baseline KL.")
    else:
        parts.append(
            f"{_code('kl_masked')} is with the kept pairs, {_code('kl_unmasked')} that of the dictionary they come "
            f"from with all of its own, {_code('kl_no_pairs')} with none; "
            f"{_code('kl_masked_recovered')} is 1 − kl_masked / kl_baseline, {_code('mask_recovered')} "
            "(kl_no_pairs − kl_masked) / (kl_no_pairs − kl_unmasked)."
        )
    return " ".join(parts)


def _how_to_load(training: Training) -> str:
    return f"""```python
from qkmodel import load_dictionary  # of the QK sweep orchestrator

dictionary = load_dictionary("FOLDER", sha256="{training.dictionary_sha256}")
# x: what the layer's query and key projections receive, [batch, token, d_model]
f_query = dictionary.transcoder.query.encode(x)  # [batch, token, feature], non-negative
p_hat = dictionary.pattern(x)  # [batch, head, query, key], of the kept pairs where they are masked
```

The folder holds safetensors and JSON only; with `sha256` every file is compared with what was recorded in training."""


def _provenance(sweep: SweepRecord, choice: Choice, config: DictionaryConfig) -> list[tuple[str, str]]:
    training = choice.training
    values = training.hyperparameters.items()
    rows = {
        "sweep": sweep.name,
        "study": choice.status.study.study_id,
        "training": training.training_id,
        "hyperparameters": ", ".join(f"{name}={value}" for name, value in values if value is not None),
        "sweep seed": config.sweep_seed,
        "dictionary, SHA-256": training.dictionary_sha256,
        "model weights, SHA-256": config.model.weights_sha256,
        "model revision": config.model.config.revision,
        "corpus, SHA-256": config.corpus.sha256,
        "hook": config.model.hook,
        "code": config.git_sha,
        "packages": ", ".join(f"{name} {version}" for name, version in sorted(config.versions.items())),
    }
    return [(name, _code(str(value))) for name, value in rows.items() if value is not None]


def _shown(choice: Choice) -> list[Training]:
    """The front, and the chosen training where it is not on it."""
    front = choice.status.front
    return front if choice.training in front else [*front, choice.training]


def _member(training: Training, chosen: Training) -> tuple[str, ...]:
    mark = "**this**" if training.training_id == chosen.training_id else ""
    return (mark, *(_figure(training.metrics.get(name)) for name in _front(training)), training.label)


def _both_ways(config: DictionaryConfig, name: str) -> tuple[str, ...]:
    return (_code(name), _figure(config.metrics.get(name)), _figure(config.metrics.get(f"{name}_no_bos")))


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _code(text: str) -> str:
    """Text as it stands, whatever it holds: on one line, fenced by more backticks than it has."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
