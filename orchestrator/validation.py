"""Say in one line what is wrong with a mapping that a schema refused."""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from orchestrator.search.space import Range
from qkmodel.errors import InputError

_LONGEST_VALUE = 60
_NO_KEY = ("extra_forbidden", "invalid_key")


def explain(error: ValidationError, data: Mapping[str, Any], schema: type[BaseModel]) -> str:
    """`KEY: VALUE what is wrong; what would be right`, for the first mistake, and how many more there are.

    Args:
        error: what `schema` raised on `data`.
        data: the mapping as it was before validation, in which the keys are looked up.
        schema: the model that was to be built.
    """
    mistakes = _causes(error.errors(include_url=False))
    # an unknown key is more often the cause of a missing one than the other way round
    first = next((mistake for mistake in mistakes if mistake["type"] in _NO_KEY), mistakes[0])
    if first["type"] == "extra_forbidden":
        mistakes = [mistake for mistake in mistakes if not _is_missing_for(mistake, first)]
    cause = first.get("ctx", {}).get("error")
    # an InputError raised by a validator names its key itself
    message = str(cause) if isinstance(cause, InputError) else _explain_one(first, data, schema)
    rest = len({_real_path(mistake["loc"], data) for mistake in mistakes} - {_real_path(first["loc"], data)})
    return f"{message} (and {rest} more to put right)" if rest else message


def _causes(mistakes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Without those that only follow from another: a list that is too short once its bad entries are left out."""
    places = [mistake["loc"] for mistake in mistakes]
    return [
        mistake
        for mistake in mistakes
        if not any(
            len(place) > len(mistake["loc"]) and place[: len(mistake["loc"])] == mistake["loc"] for place in places
        )
    ]


def _is_missing_for(mistake: Mapping[str, Any], unknown: Mapping[str, Any]) -> bool:
    """Whether a key is missing because it was misspelt as the unknown one."""
    *parents, key = unknown["loc"]
    *others, missing = mistake["loc"]
    is_beside = mistake["type"] == "missing" and others == parents
    return is_beside and bool(difflib.get_close_matches(str(key), [str(missing)]))


def _explain_one(mistake: Mapping[str, Any], data: Mapping[str, Any], schema: type[BaseModel]) -> str:
    path = _real_path(mistake["loc"], data)
    key = _written(path)
    cause = mistake.get("ctx", {}).get("error")
    match mistake["type"]:
        case "missing":
            return f"{key}: is missing{_example(path, schema)}"
        case "extra_forbidden":
            return f"{key}: is no key here; {_near(str(path[-1]), _fields(path, schema))}"
        case "invalid_key":
            return f"{key}: {_shown(mistake['input'])} is no key; keys are words"
        case "value_error":
            wrong = str(cause)
        case "literal_error":
            choices = [choice.strip("'") for choice in mistake["ctx"]["expected"].replace(" or ", ", ").split(", ")]
            wrong = f"is unknown; {_near(mistake['input'], choices)}"
        case "string_type":
            wrong = "must be text; put it in quotes if it is"
        case "tuple_type" | "list_type":
            wrong = "must be a list, in brackets"
        case "model_type" | "dict_type":
            wrong = "must be a mapping of keys to values"
        case "string_too_short" | "too_short":
            wrong = "must not be empty"
        case "byte_size" | "byte_size_unit":
            wrong = "must be a size such as 20 GB"
        case kind if kind.startswith("int_"):
            wrong = "must be a whole number" + _digit_advice(mistake["input"])
        case kind if kind.startswith("float_"):
            wrong = "must be a number" + _digit_advice(mistake["input"])
        case kind if kind.startswith("bool_"):
            wrong = "must be true or false"
        case _:
            wrong = mistake["msg"].replace("Input should be", "must be").replace("greater than or equal to", "at least")
    value = mistake["input"]
    # a mapping is no help to see, and some validators begin with the value themselves
    if isinstance(cause, ValueError) and (isinstance(value, BaseModel | Mapping) or wrong.startswith(repr(value))):
        return f"{key}: {wrong}"
    return f"{key}: {_shown(value)} {wrong}{_example(path, schema)}"


def _real_path(location: Sequence[str | int], data: object) -> tuple[str | int, ...]:
    """Pydantic's location without the names of union branches that it puts between keys."""
    path: list[str | int] = []
    node: Any = data
    if "[key]" in location:
        # what follows is which of several kinds of key it is not
        location = location[: location.index("[key]")]
    for position, part in enumerate(location):
        if _holds(node, part):
            node = node[part]
        elif position < len(location) - 1 or isinstance(part, int) or not isinstance(node, Mapping):
            continue
        path.append(part)
    return tuple(path)


def _holds(node: object, part: str | int) -> bool:
    if isinstance(node, Mapping):
        return part in node
    return isinstance(node, list | tuple) and isinstance(part, int) and part < len(node)


def _written(path: Sequence[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{shorten(part)}" for part in path).removeprefix(".")


def _digit_advice(value: object) -> str:
    return "; digits group with _: 100_000" if isinstance(value, str) and "," in value else ""


def _fields(path: Sequence[str | int], schema: type[BaseModel]) -> Mapping[str, Any]:
    """The fields of the model in which the last key of `path` stands: of a range, inside a search space."""
    model = schema
    for part in path[:-1]:
        field = model.model_fields.get(str(part))
        # a key of a mapping, or a place in a list, whose kind was found with the field that holds it
        if field is None:
            continue
        inner = _model_in(field.annotation)
        if inner is None:
            return Range.model_fields
        model = inner
    return model.model_fields


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The schema within a field's type, whatever unions, mappings and lists are around it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part)) is not None), None)


def _example(path: Sequence[str | int], schema: type[BaseModel]) -> str:
    field = _fields(path, schema).get(str(path[-1]))
    if field is None or not field.examples:
        return ""
    return f"; write for example {path[-1]}: {_shown(field.examples[0])}"


def _near(word: object, known: Sequence[str] | Mapping[str, Any]) -> str:
    # null is nobody's misspelling
    near = difflib.get_close_matches(word, list(known), n=1) if isinstance(word, str) else []
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def _shown(value: object) -> str:
    return shorten(json.dumps(value, default=str, ensure_ascii=False))


def shorten(text: str) -> str:
    """What of a long text is enough to know it again."""
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "…"
