"""The search space of a sweep file: what a training's hyperparameters may be."""

import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PlainValidator, Tag

from qkmodel.schema import Schema
from qkmodel.tasks import HYPERPARAMETERS, defaults, parse_hyperparameters, task_of


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
        raise ValueError("is neither a number nor a word")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("is not a finite number")
    return value


def _choosable(value: object) -> bool | int | float | str:
    return value if isinstance(value, bool) else _scalar(value)


def _form(setting: object) -> Literal["range", "choice", "value"]:
    if isinstance(setting, Mapping | Range):
        return "range"
    return "choice" if isinstance(setting, list | tuple) else "value"


# A plain validator, so that 1 stays an integer, "1" stays a word and true is refused rather than read as 1.
Scalar = Annotated[int | float | str, PlainValidator(_scalar)]
# Where it may be true or false; for which hyperparameters, `validate_space` knows.
Choosable = Annotated[bool | int | float | str, PlainValidator(_choosable)]

# The form is read off the value first, so that an error speaks of that form alone.
Setting = Annotated[
    Annotated[Range, Tag("range")] | Annotated[list[Choosable], Tag("choice")] | Annotated[Choosable, Tag("value")],
    Discriminator(_form),
]

# Hyperparameter name -> a value (fixed), a list (choice) or a range.
Alternative = dict[str, Setting]

# Up to this many points a grid is listed to be counted.
_LISTED_POINTS = 100_000


def dimensions(alternative: Alternative) -> tuple[str, ...]:
    """Names of the hyperparameters that vary, in the order of their task's fields."""
    return tuple(
        name
        for name, setting in ordered(alternative)
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
    return type_of(name) is int


def canonical(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """The same hyperparameters as every part of a search writes them.

    What has a default is present (`seed`), what does not apply is absent, 512.0 features are 512, keys stand in the
    order of their task's fields.

    Raises:
        pydantic.ValidationError: they are no valid hyperparameters.
    """
    return parse_hyperparameters(hyperparameters).model_dump(exclude_none=True)


def contains(alternative: Alternative, hyperparameters: Mapping[str, Any]) -> bool:
    """Whether canonical `hyperparameters` could have come from this alternative."""
    settings = defaults(task_of(alternative)) | alternative
    if settings.keys() != hyperparameters.keys():
        return False
    for name, setting in settings.items():
        value = hyperparameters[name]
        inside = setting.low <= value <= setting.high if isinstance(setting, Range) else value in values(setting)
        if not inside:
            return False
    return True


def values(setting: Setting) -> list[bool | int | float | str]:
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
        names = [name for name, _ in ordered(alternative)]
        for combination in _product([levels(name, alternative[name]) for name in names]):
            point = canonical(dict(zip(names, combination, strict=True)))
            key = tuple(point.items())
            if key not in seen:
                seen.add(key)
                yield point


def _product(factors: Sequence[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    """As itertools.product, which would first write out a range of a million million seeds."""
    if not factors:
        yield ()
        return
    for first in factors[0]:
        for rest in _product(factors[1:]):
            yield first, *rest


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


def ordered(alternative: Alternative) -> list[tuple[str, Setting]]:
    """The settings in the order of their task's fields."""
    fields = HYPERPARAMETERS[task_of(alternative)].model_fields
    return [(name, alternative[name]) for name in fields if name in alternative]


def type_of(name: str) -> type[int] | type[float] | type[bool] | type[str] | tuple[str, ...]:
    """What a hyperparameter of any task takes: whole numbers, numbers, true or false, or one of some words."""
    # where tasks share a name it takes the same
    task = next(task for task, kind in HYPERPARAMETERS.items() if name in kind.model_fields)
    annotation = HYPERPARAMETERS[task].model_fields[name].annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        (annotation,) = (part for part in typing.get_args(annotation) if part is not type(None))
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else annotation
