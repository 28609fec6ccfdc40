"""The search space of a sweep file: what a training's hyperparameters may be."""

import difflib
import itertools
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PlainValidator, Tag, ValidationError

from qkmodel.errors import InputError
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.schema import Schema


class Range(Schema):
    """Every number from `low` to `high`, both included.

    `log` spaces the numbers geometrically. `points` is how many of them a grid visits; the other samplers
    take the range as continuous (or as every whole number, for a hyperparameter that is one).
    """

    low: float = Field(strict=True)
    high: float = Field(strict=True)
    log: bool = Field(default=False, strict=True)
    points: int | None = Field(default=None, strict=True)


def _scalar(value: object) -> int | float | str:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is neither a number nor a word")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return value


def _form(setting: object) -> Literal["range", "choice", "value"]:
    if isinstance(setting, Mapping | Range):
        return "range"
    return "choice" if isinstance(setting, list | tuple) else "value"


# A plain validator, so that 1 stays an integer, "1" stays a word and true is refused rather than read as 1.
Scalar = Annotated[int | float | str, PlainValidator(_scalar)]

# The form is read off the value first, so that an error speaks of that form alone.
Setting = Annotated[
    Annotated[Range, Tag("range")] | Annotated[list[Scalar], Tag("choice")] | Annotated[Scalar, Tag("value")],
    Discriminator(_form),
]

# Hyperparameter name -> a value (fixed), a list (choice) or a range.
Alternative = dict[str, Setting]

# Up to this many points a grid is listed to be counted.
_LISTED_POINTS = 100_000
# More digits than this help nobody to find a number in a file.
_LONGEST_NUMBER = 30


def validate_space(alternatives: Sequence[Alternative], sampler: str, trainings: int) -> None:
    """Refuse a space that holds a training that cannot be run, or that `sampler` cannot search.

    Args:
        alternatives: the space; a training takes all its hyperparameters from one of them.
        sampler: `auto`, `grid`, `random`, `tpe`, `gp` or `nsga2`.
        trainings: the budget per layer; a grid has to fit in it.

    Raises:
        InputError: one line that names `search.space.KEY` (`search.space[1].KEY` if there are several
            alternatives), the value and what would be right.
    """
    if not alternatives:
        raise InputError("search.space: is empty; name dictionary_size, activation and learning_rate at least")
    for index, alternative in enumerate(alternatives):
        where = "search.space" if len(alternatives) == 1 else f"search.space[{index}]"
        _check_alternative(where, alternative, sampler)
        for earlier in range(index):
            if _normalised(alternatives[earlier]) == _normalised(alternative):
                raise InputError(f"{where}: is the same as search.space[{earlier}]; leave one of the two out")
    if len(alternatives) > 1 and sampler in ("gp", "nsga2"):
        raise InputError(
            f"search.sampler: {sampler} cannot search a list of alternatives; write auto, tpe, random or grid"
        )
    if sampler == "grid":
        size = grid_size(alternatives)
        if size > trainings:
            raise InputError(
                f"search.space: the grid has {size} points but search.trainings is {trainings}: "
                f"raise it to {size} or take points away"
            )


def dimensions(alternative: Alternative) -> tuple[str, ...]:
    """Names of the hyperparameters that vary, in the order of `Hyperparameters`' fields."""
    return tuple(
        name
        for name, setting in _ordered(alternative)
        if isinstance(setting, Range) or (isinstance(setting, list) and len(setting) > 1)
    )


def is_numeric(alternative: Alternative) -> bool:
    """Whether every hyperparameter that varies is a range."""
    return all(isinstance(alternative[name], Range) for name in dimensions(alternative))


def is_finite_choice(alternative: Alternative) -> bool:
    """Whether there are only values and lists, no ranges."""
    return not any(isinstance(setting, Range) for setting in alternative.values())


def is_integer(name: str) -> bool:
    """Whether the hyperparameter takes whole numbers only."""
    return _type_of(name) is int


def canonical(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """The same hyperparameters as every part of a search writes them.

    `seed` is present (0 unless given), what does not apply is absent, 512.0 features are 512, keys stand in
    the order of `Hyperparameters`' fields.

    Raises:
        pydantic.ValidationError: they are no valid hyperparameters.
    """
    return Hyperparameters(**hyperparameters).model_dump(exclude_none=True)


def contains(alternative: Alternative, hyperparameters: Mapping[str, Any]) -> bool:
    """Whether canonical `hyperparameters` could have come from this alternative."""
    settings = {"seed": 0, **alternative}
    if settings.keys() != hyperparameters.keys():
        return False
    for name, setting in settings.items():
        value = hyperparameters[name]
        inside = setting.low <= value <= setting.high if isinstance(setting, Range) else value in values(setting)
        if not inside:
            return False
    return True


def values(setting: Setting) -> list[int | float | str]:
    """The values of a choice, or the one value of a fixed setting."""
    return setting if isinstance(setting, list) else [setting]


def extremes(name: str, setting: Setting) -> list[int | float | str]:
    """The values of a choice or a fixed setting, or the two ends of a range."""
    if not isinstance(setting, Range):
        return values(setting)
    ends = [setting.low, setting.high]
    return [round(end) for end in ends] if is_integer(name) else ends


def grid(alternatives: Sequence[Alternative]) -> list[dict[str, Any]]:
    """Every point of the grid once, canonical, the last hyperparameter varying fastest.

    Ranges give `points` values, evenly or (`log`) geometrically spaced; whole numbers are rounded, other
    numbers between the two ends are rounded to 6 significant digits, so that names and hashes read well.
    """
    return list(_points(alternatives, _grid_levels))


def grid_size(alternatives: Sequence[Alternative]) -> int:
    """How many points `grid` gives; points that overlapping alternatives share count once.

    Above 100,000 points they are no longer listed to find the shared ones, and count once per alternative.
    """
    counted = sum(
        math.prod(len(_grid_levels(name, setting)) for name, setting in alternative.items())
        for alternative in alternatives
    )
    return counted if counted > _LISTED_POINTS else len(grid(alternatives))


def enumerate_space(alternatives: Sequence[Alternative]) -> Iterator[dict[str, Any]] | None:
    """Every point of a finite space once, lazily; None if some range is of real numbers."""
    if any(
        isinstance(setting, Range) and not is_integer(name)
        for alternative in alternatives
        for name, setting in alternative.items()
    ):
        return None
    return _points(alternatives, _all_levels)


def _points(alternatives: Sequence[Alternative], levels: Any) -> Iterator[dict[str, Any]]:
    seen = set()
    for alternative in alternatives:
        names = [name for name, _ in _ordered(alternative)]
        for combination in itertools.product(*(levels(name, alternative[name]) for name in names)):
            point = canonical(dict(zip(names, combination, strict=True)))
            key = tuple(point.items())
            if key not in seen:
                seen.add(key)
                yield point


def _grid_levels(name: str, setting: Setting) -> list[int | float | str]:
    if not isinstance(setting, Range):
        return values(setting)
    steps = [step / (setting.points - 1) for step in range(1, setting.points - 1)]
    if setting.log:
        between = [setting.low * (setting.high / setting.low) ** step for step in steps]
    else:
        between = [setting.low + (setting.high - setting.low) * step for step in steps]
    between = [min(max(float(f"{value:.6g}"), setting.low), setting.high) for value in between]
    levels = [setting.low, *between, setting.high]
    return list(dict.fromkeys([round(value) for value in levels] if is_integer(name) else levels))


def _all_levels(name: str, setting: Setting) -> Sequence[int | float | str]:
    if isinstance(setting, Range):
        return range(round(setting.low), round(setting.high) + 1)
    return values(setting)


def _ordered(alternative: Alternative) -> list[tuple[str, Setting]]:
    return [(name, alternative[name]) for name in Hyperparameters.model_fields if name in alternative]


def _normalised(alternative: Alternative) -> dict[str, Any]:
    """For comparison: [x] is x, a choice has no order, seed is 0 unless given."""
    settings = {"seed": 0, **alternative}
    return {
        name: setting if isinstance(setting, Range) else frozenset(values(setting))
        for name, setting in settings.items()
    }


def _check_alternative(where: str, alternative: Alternative, sampler: str) -> None:
    if not alternative:
        raise InputError(f"{where}: is empty; name dictionary_size, activation and learning_rate at least")
    for name, setting in alternative.items():
        key = f"{where}.{name}"
        if name not in Hyperparameters.model_fields:
            raise InputError(f"{key}: unknown hyperparameter; {_suggestion(name, Hyperparameters.model_fields)}")
        if isinstance(setting, Range):
            _check_range(key, name, setting, sampler)
        else:
            _check_values(key, name, setting)
    _check_combinations(where, alternative)


def _check_range(key: str, name: str, setting: Range, sampler: str) -> None:
    expected = _type_of(name)
    if not isinstance(expected, type):
        raise InputError(f"{key}: is a range, but takes one of {', '.join(expected)}, or a list of them")
    if setting.low >= setting.high:
        raise InputError(f"{key}: low {setting.low:g} is not below high {setting.high:g}")
    if setting.log and setting.low <= 0:
        raise InputError(f"{key}: low {setting.low:g} of a log range has to be above 0")
    if is_integer(name) and not (setting.low.is_integer() and setting.high.is_integer()):
        raise InputError(f"{key}: takes whole numbers, but the range goes from {setting.low:g} to {setting.high:g}")
    if setting.points is not None and setting.points < 2:
        raise InputError(f"{key}: points {setting.points} is too few; a range has 2 points or more")
    if sampler == "grid" and setting.points is None:
        raise InputError(f"{key}: a grid needs points in a range, for example points: 4")


def _check_values(key: str, name: str, setting: Setting) -> None:
    if setting == []:
        raise InputError(f"{key}: the list is empty; fill it or leave the key out")
    expected = _type_of(name)
    seen = set()
    for value in values(setting):
        if not isinstance(expected, type):
            if value not in expected:
                raise InputError(f"{key}: {value!r} is unknown; {_suggestion(value, expected)}")
        elif isinstance(value, str) or (expected is int and value != int(value)):
            kind = "a whole number" if expected is int else "a number"
            raise InputError(f"{key}: {value!r} is not {kind}")
        if value in seen:
            raise InputError(f"{key}: {value!r} is in the list twice; leave one out")
        seen.add(value)


def _check_combinations(where: str, alternative: Alternative) -> None:
    """Build the trainings at the corners of the space.

    Every rule of `Hyperparameters` about a number is a bound or an order between two numbers, so the
    smallest and the largest value of each speak for those between them.
    """
    corners = {}
    for name, setting in _ordered(alternative):
        if isinstance(setting, Range):
            corners[name] = (setting.low, setting.high)
        elif isinstance(_type_of(name), type):
            corners[name] = tuple(dict.fromkeys((min(values(setting)), max(values(setting)))))
        else:
            corners[name] = tuple(values(setting))
    for combination in itertools.product(*corners.values()):
        try:
            Hyperparameters(**dict(zip(corners, combination, strict=True)))
        except ValidationError as error:
            raise InputError(_explain(where, alternative, error)) from None


def _explain(where: str, alternative: Alternative, error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    if first["type"] == "missing":
        return f"{where}: {first['loc'][0]} is missing; every training needs one"
    if first["loc"]:
        message = first["msg"].replace("Input should be", "has to be")
        return f"{where}.{first['loc'][0]}: {_shown(first['input'])} {message}"
    reason = str(first["ctx"]["error"])
    if len(values(alternative["activation"])) > 1:
        reason += "; write one alternative per activation, as a list of mappings"
    return f"{where}: {reason}"


def _shown(number: float) -> str:
    text = str(number) if isinstance(number, int) else f"{number:g}"
    return text if len(text) <= _LONGEST_NUMBER else f"{text[:_LONGEST_NUMBER]}…"


def _suggestion(word: object, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def _type_of(name: str) -> type[int] | type[float] | tuple[str, ...]:
    """What a hyperparameter takes: whole numbers, numbers, or one of some words."""
    annotation = Hyperparameters.model_fields[name].annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        (annotation,) = (part for part in typing.get_args(annotation) if part is not type(None))
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else annotation
