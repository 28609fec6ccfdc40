"""From a sweep file, packaged presets and command-line overrides to one plain mapping.

Presets are Hydra config groups (`orchestrator/conf/GROUP/NAME.yaml`) and overrides are written in Hydra's
grammar. A later source wins: presets that the file names, the file's own keys, presets named on the
command line, values given there. Nothing here knows the schema of a sweep.
"""

import difflib
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from orchestrator.yaml_file import read_mapping
from qkmodel.errors import InputError

_PRESETS = "orchestrator.conf"

# Groups in which any word is good: what is no preset's name is the `name` of what is meant.
_NAMED = ("model", "corpus")

_LONGEST_SHOWN = 100


def compose_sweep(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The mapping that `path` and `overrides` describe together, with no defaults of the schema filled in.

    `model`, `corpus` and `search` may each be the name of a preset; for model and corpus any other word
    is short for `{name: WORD}`. The file may also start from presets with a Hydra defaults list,
    `defaults: [search: topk]`, over which its own keys are laid.

    Raises:
        InputError: the file cannot be read, or an override cannot be understood or applied.
    """
    written = read_mapping(path)
    chosen = _defaults_list(path, written.pop("defaults", []))
    composed = _merge(_compose_presets(chosen), _expand(str(path), written))
    for text in overrides:
        where = f"{path}: override {text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + '…'}"
        _apply(where, composed, _parse(where, text))
    return composed


def preset_names(group: str) -> list[str]:
    """Names of the packaged presets of a group, in alphabetical order; none if there is no such group."""
    folder = resources.files(_PRESETS) / group
    if not group.isidentifier() or not folder.is_dir():
        return []
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def _compose_presets(chosen: dict[str, str]) -> dict[str, Any]:
    if not chosen:  # Hydra takes a tenth of a second even for nothing
        return {}
    # Hydra keeps its state in a process-wide singleton, which a program around us may have initialised
    GlobalHydra.instance().clear()
    with initialize_config_module(_PRESETS, version_base="1.3"):
        composed = compose(overrides=[f"+{group}={name}" for group, name in chosen.items()])
    return OmegaConf.to_container(composed, resolve=False)


def _defaults_list(path: Path, entries: object) -> dict[str, str]:
    """What a Hydra defaults list chooses: group -> preset."""
    form = "defaults is a list of presets such as [search: topk, model: gpt2]"
    if not isinstance(entries, list):
        raise InputError(f"{path}: defaults: {entries} is not a list; {form}")
    if "_self_" in entries[:-1]:
        raise InputError(f"{path}: defaults: _self_ comes last, since the file's own keys are laid over presets")
    chosen: dict[str, str] = {}
    for index, entry in enumerate(entry for entry in entries if entry != "_self_"):
        if not isinstance(entry, dict) or len(entry) != 1:
            raise InputError(f"{path}: defaults[{index}]: {entry} is not group: preset; {form}")
        ((key, name),) = entry.items()
        group = key.removeprefix("/")
        if group in chosen:
            raise InputError(f"{path}: defaults: {group} is chosen twice; keep one")
        if name not in preset_names(group):
            raise InputError(f"{path}: defaults[{index}]: {key}: {_unknown_preset(group, name)}")
        chosen[group] = name
    return chosen


def _unknown_preset(group: str, name: object) -> str:
    names = preset_names(group)
    if not names:
        return "there are no such presets; groups are model, corpus and search"
    near = difflib.get_close_matches(str(name), names, n=1)
    return f"no preset is called {name}; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}")


def _expand(where: str, values: dict[str, Any]) -> dict[str, Any]:
    """Put presets, and the long form of a bare name, in place of words."""
    expanded = dict(values)
    for group, value in values.items():
        if not isinstance(value, str):
            continue
        if value in preset_names(group):
            expanded |= _compose_presets({group: value})
        elif group in _NAMED:
            expanded[group] = {"name": value}
        elif preset_names(group):
            raise InputError(f"{where}: {group}: {_unknown_preset(group, value)}")
    return expanded


def _merge(below: Any, above: Any) -> Any:
    """Mappings merge key by key; anything else above replaces what is below."""
    if isinstance(below, dict) and isinstance(above, dict):
        return below | {key: _merge(below.get(key), value) for key, value in above.items()}
    return above


def _parse(where: str, text: str) -> Override:
    if "${" in text:
        raise InputError(f"{where}: is an interpolation; write the value itself")
    try:
        override = OverridesParser.create().parse_override(text)
    except (HydraException, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{where}: cannot be read ({reason}); write KEY=VALUE, and KEY='\"VALUE\"' for unusual characters"
        ) from None
    if not override.key_or_group:
        raise InputError(f"{where}: has no key; write KEY=VALUE")
    if override.is_delete() and "=" in text:
        raise InputError(f"{where}: gives a value to take away; write ~{override.key_or_group}")
    if override.package is not None:
        raise InputError(f"{where}: has a package (@); write KEY=VALUE")
    if override.is_sweep_override():
        raise InputError(
            f"{where}: names several runs; lists go in brackets: {override.key_or_group}=[1,2] "
            "(what trainings differ in stands under search.space)"
        )
    return override


def _apply(where: str, composed: dict[str, Any], override: Override) -> None:
    """Set (`key=`, `+key=` and `++key=` alike) or delete (`~key`) one key of `composed`, in place."""
    *parents, last = override.key_or_group.split(".")
    node: Any = composed
    for depth, part in enumerate(parents):
        if isinstance(node, dict):
            node = node.setdefault(part, {})
        elif isinstance(node, list):
            node = node[_index(where, node, part, parents[:depth])]
        if not isinstance(node, dict | list):
            holder = ".".join(parents[: depth + 1])
            raise InputError(f"{where}: {holder} holds {json.dumps(node)}, which has no keys; set {holder} itself")
    if isinstance(node, list):
        last = _index(where, node, last, parents)
    if override.is_delete():
        if isinstance(node, dict) and last not in node:
            raise InputError(f"{where}: there is no {override.key_or_group} to take away")
        del node[last]
        return
    value = override.value()
    node[last] = value if parents else _expand(where, {last: value})[last]


def _index(where: str, entries: list[Any], part: str, parents: Sequence[str]) -> int:
    if part.isdecimal() and int(part) < len(entries):
        return int(part)
    raise InputError(
        f"{where}: {'.'.join(parents)} is a list of {len(entries)}, counted from 0, and has no entry {part}"
    )
