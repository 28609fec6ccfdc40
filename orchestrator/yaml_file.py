"""Read a YAML file that a person wrote, strictly: what YAML would silently bend is refused with its line."""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from qkmodel.errors import InputError

_MOST_BYTES = 256 * 1024
_DEEPEST = 20
_MOST_DIGITS = 100
_GROUP_OF_DIGITS = re.compile(r"[0-9]{3}")
_PLAIN_TAGS = {
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "timestamp", "seq", "map")
}


def read_mapping(path: Path, kind: str = "sweep file") -> dict[str, Any]:
    """The mapping that a YAML file of a kind holds, as plain dictionaries, lists and scalars.

    Numbers are read as OmegaConf reads them (`1e-3` is a number). Refused besides broken YAML: a key that
    stands twice, a key that is not text, tags, aliases and interpolations.

    Raises:
        InputError: one line with the file and, where there is one, the line and column.
    """
    text = _read_text(path, kind)
    try:
        _check_structure(path, text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            raise InputError(f"{path}: is empty; a {kind} is a YAML mapping, key: value lines")
        if not isinstance(root, yaml.MappingNode):
            raise InputError(f"{path}: holds no mapping but a {root.id}; write key: value lines")
        _check_node(path, root, "")
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise InputError(
            f"{path}: line {mark.line + 1}, column {mark.column + 1}: this is not YAML: {error.problem}"
        ) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError(f"{path}: line {line}: holds the control character {error.character!r}") from None


def _read_text(path: Path, kind: str) -> str:
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a folder; name a {kind} in it")
        if not path.is_file():
            if path.exists():
                raise InputError(f"{path}: is a pipe or a device; give the path of a {kind}")
            if path.is_symlink():
                raise InputError(f"{path}: is a link that leads nowhere; give the path of a {kind}")
            raise InputError(f"{path}: there is no such file; {_nearest_file(path, kind)}")
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise InputError(f"{path}: holds {size:,} bytes; a {kind} is text of at most {_MOST_BYTES:,}")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8 text; save the file as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; give the path of a {kind}") from None


def _nearest_file(path: Path, kind: str) -> str:
    # without what all of them end in, which alone would make them alike
    siblings = {file.stem: file.name for file in sorted(path.parent.glob("*.yaml"))}
    near = difflib.get_close_matches(path.stem, siblings, n=1)
    return f"did you mean {path.with_name(siblings[near[0]])}?" if near else f"give the path of a {kind}"


def _check_structure(path: Path, text: str) -> None:
    """Aliases can make a small file unfold without end; nesting has no other bound than Python's stack."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        where = f"{path}: line {event.start_mark.line + 1}"
        # what a plain value has by itself; any other is refused with its key, below
        if getattr(event, "tag", None) in _PLAIN_TAGS:
            raise InputError(f"{where}: has the tag {event.tag}; write a plain value")
        if isinstance(event, yaml.AliasEvent):
            raise InputError(f"{where}: *{event.anchor} is an alias; write the value out")
        if depth > _DEEPEST:
            raise InputError(f"{where}: is nested more than {_DEEPEST} deep; no key is")


def _check_node(path: Path, node: yaml.Node, key: str) -> None:
    where = f"{path}: line {node.start_mark.line + 1}: {key or 'the file'}"
    if node.tag not in _PLAIN_TAGS:
        raise InputError(f"{where}: has the tag {node.tag}; write a plain value")
    if isinstance(node, yaml.ScalarNode):
        if "${" in node.value:
            raise InputError(f"{where}: {node.value} is an interpolation; write the value itself")
        if node.tag.endswith((":int", ":float")):
            _check_number(where, node.value)
    elif isinstance(node, yaml.MappingNode):
        for name, child in _entries(path, node, key):
            _check_node(path, child, name)
    else:
        for index, child in enumerate(node.value):
            _check_node(path, child, f"{key}[{index}]")


def _check_number(where: str, text: str) -> None:
    digits = text.lstrip("+-").replace("_", "")
    if len(digits) > _MOST_DIGITS:
        raise InputError(f"{where}: is a number of {len(digits)} digits; write at most {_MOST_DIGITS}")
    # YAML 1.1 reads 010 as 8 and 1:30 as 90
    if ":" in digits or (len(digits) > 1 and digits[0] == "0" and digits.isdecimal()):
        raise InputError(f"{where}: {text} is a number in base 8 or 60 to YAML; write it without leading 0 or colon")


def _entries(path: Path, node: yaml.MappingNode, key: str) -> Iterator[tuple[str, yaml.Node]]:
    lines: dict[str, int] = {}
    for name_node, child in node.value:
        line = name_node.start_mark.line + 1
        where = f"{path}: line {line}:"
        if node.flow_style and _GROUP_OF_DIGITS.fullmatch(str(name_node.value)):
            raise InputError(f"{where} a comma ends a value in braces; digits group with _: 100_000")
        if name_node.tag == "tag:yaml.org,2002:null":
            raise InputError(f"{where} a key is null; write a word")
        if name_node.tag != "tag:yaml.org,2002:str":
            raise InputError(f"{where} the key {_shown(name_node)} is not text; put it in quotes")
        name = f"{key}.{name_node.value}" if key else name_node.value
        if "${" in name:
            raise InputError(f"{where} the key {name} is an interpolation; write the key itself")
        if name_node.value in lines:
            raise InputError(f"{where} {name}: stands twice, first on line {lines[name_node.value]}; keep one")
        lines[name_node.value] = line
        yield name, child


def _shown(node: yaml.Node) -> str:
    return node.value if isinstance(node, yaml.ScalarNode) else f"that starts there, a {node.id},"
