"""Why a sweep opens new studies beside those that its ledger holds: the keys of the file that changed."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchestrator.ledger_records import Study
from orchestrator.study_plan import StudyPlan

# what a file's content is known by: the key that names the file, and what of it changed
_HASHED = {
    "weights_sha256": ("model", "its weights are others now"),
    "tokenizer_sha256": ("model", "its tokeniser is another now"),
    "corpus.sha256": ("corpus", "its text is another now"),
    "attempt": ("--fresh", "everything is begun anew"),
}
_KEYS = {"dtype": "activations.dtype"}


def change_lines(recorded: Sequence[Study], wanted: Sequence[StudyPlan], task: str) -> list[str]:
    """A line per reason, for those wanted studies that are new although their layer has studies already.

    Of a layer's recorded studies the one counts that differs in the fewest keys, the latest of several.
    """
    known = {study.study_id for study in recorded}
    layers: dict[str, list[int]] = {}
    for study in wanted:
        earlier = [one for one in recorded if (one.layer, one.task) == (study.layer, task)]
        if study.study_id in known or not earlier:
            continue
        changes = [list(_changes(one.identity, study.identity)) for one in reversed(earlier)]
        layers.setdefault("; ".join(min(changes, key=len)), []).append(study.layer)
    return [_line(reason, at) for reason, at in layers.items()]


def _line(reason: str, layers: Sequence[int]) -> str:
    where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}"
    return f"{where}: trained anew beside the earlier results, since {reason}"


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    old, new = dict(_flat(before)), dict(_flat(now))
    seen = set()
    for name in (*new, *old):
        if old.get(name) == new.get(name) or name in seen:
            continue
        seen.add(name)
        if name in _HASHED:
            key, what = _HASHED[name]
            yield f"{key}: {what}"
        else:
            yield f"{_KEYS.get(name, name)} is {_shown(new.get(name))}, not {_shown(old.get(name))}"


def _flat(identity: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in identity.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
