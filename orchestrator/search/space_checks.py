"""What is wrong with a search space, in one line that names the key."""

import difflib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import ValidationError

from orchestrator.search.space import (
    Alternative,
    Range,
    Setting,
    grid_size,
    is_finite_choice,
    is_integer,
    ordered,
    type_of,
    values,
)
from qkmodel.errors import InputError
from qkmodel.hyperparameters import WrongActivation
from qkmodel.tasks import HYPERPARAMETERS, defaults, parse_hyperparameters, task_of

# as many as a search may have trainings
MOST_POINTS = 100_000
# what is empty does not say of which task it is
_AT_LEAST = "name dictionary_size, activation and learning_rate at least, or pair_cost in a sweep of pair masks"


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
        raise InputError(f"search.space: is empty; {_AT_LEAST}")
    for index, alternative in enumerate(alternatives):
        where = "search.space" if len(alternatives) == 1 else f"search.space[{index}]"
        _check_alternative(where, alternative, sampler)
        for earlier in range(index):
            if _normalised(alternatives[earlier]) == _normalised(alternative):
                raise InputError(f"{where}: is the same as search.space[{earlier}]; leave one of the two out")
    if sampler == "gp" and all(map(is_finite_choice, alternatives)):
        raise InputError(
            "search.sampler: gp learns along ranges, and search.space has none; write {low: …, high: …} for a "
            "hyperparameter, or sampler grid, random or tpe"
        )
    if len(alternatives) > 1 and sampler in ("gp", "nsga2"):
        raise InputError(
            f"search.sampler: {sampler} cannot search a list of alternatives; write auto, tpe, random or grid"
        )
    if sampler == "grid":
        size = grid_size([_of_some_dictionary(alternative) for alternative in alternatives])
        if size > trainings:
            raise InputError(
                f"search.space: the grid has {size} points but search.trainings is {trainings}: "
                f"raise it to {size} or take points away"
            )


def _normalised(alternative: Alternative) -> dict[str, Any]:
    """For comparison: [x] is x, a choice has no order, what has a default is there."""
    settings = defaults(task_of(alternative)) | alternative
    return {
        name: setting if isinstance(setting, Range) else frozenset(values(setting))
        for name, setting in settings.items()
    }


def _check_alternative(where: str, alternative: Alternative, sampler: str) -> None:
    if not alternative:
        raise InputError(f"{where}: is empty; {_AT_LEAST}")
    for name, setting in alternative.items():
        key = f"{where}.{name}"
        if name == "dictionary":
            raise InputError(f"{key}: is not written here; pair_mask.dictionaries says whose pairs are masked")
        known = [one for one in HYPERPARAMETERS[task_of(alternative)].model_fields if one != "dictionary"]
        if name not in known:
            raise InputError(f"{key}: unknown hyperparameter; {_suggestion(name, known)}")
        if isinstance(setting, Range):
            _check_range(key, name, setting, sampler)
        else:
            _check_values(key, name, setting)
    _check_combinations(where, alternative)


def _check_range(key: str, name: str, setting: Range, sampler: str) -> None:
    expected = type_of(name)
    if expected not in (int, float):
        words = "true, false" if expected is bool else ", ".join(expected)
        raise InputError(f"{key}: is a range, but takes one of {words}, or a list of them")
    if setting.low >= setting.high:
        raise InputError(f"{key}: low {setting.low:g} is not below high {setting.high:g}")
    if setting.log and setting.low <= 0:
        raise InputError(f"{key}: low {setting.low:g} of a log range has to be above 0")
    if is_integer(name) and not (setting.low.is_integer() and setting.high.is_integer()):
        raise InputError(f"{key}: takes whole numbers, but the range goes from {setting.low:g} to {setting.high:g}")
    if setting.points is not None and not 2 <= setting.points <= MOST_POINTS:
        raise InputError(f"{key}: points {setting.points} has to be from 2 to {MOST_POINTS:,}")
    if sampler == "grid" and setting.points is None:
        raise InputError(f"{key}: a grid needs points in a range, for example points: 4")


def _check_values(key: str, name: str, setting: Setting) -> None:
    if setting == []:
        raise InputError(f"{key}: the list is empty; fill it or leave the key out")
    expected = type_of(name)
    seen = set()
    for value in values(setting):
        if not isinstance(expected, type):
            if value not in expected:
                raise InputError(f"{key}: {value!r} is unknown; {_suggestion(value, expected)}")
        elif expected is bool:
            if not isinstance(value, bool):
                raise InputError(f"{key}: {value!r} is neither true nor false")
        elif isinstance(value, bool):
            raise InputError(f"{key}: {str(value).lower()} is neither a number nor a word")
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
    for name, setting in ordered(_of_some_dictionary(alternative)):
        if isinstance(setting, Range):
            corners[name] = (setting.low, setting.high)
        elif type_of(name) is not str and isinstance(type_of(name), type):
            corners[name] = tuple(dict.fromkeys((min(values(setting)), max(values(setting)))))
        else:
            corners[name] = tuple(values(setting))
    for combination in itertools.product(*corners.values()):
        try:
            parse_hyperparameters(dict(zip(corners, combination, strict=True)))
        except ValidationError as error:
            raise InputError(_explain(where, alternative, error)) from None


def _of_some_dictionary(alternative: Alternative) -> Alternative:
    """Whose pairs masks choose from is not known here."""
    return {"dictionary": "0" * 16, **alternative} if task_of(alternative) == "pair_mask" else alternative


def _explain(where: str, alternative: Alternative, error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    if first["type"] == "missing":
        return f"{where}: {first['loc'][0]} is missing; every training needs one"
    if first["loc"]:
        is_too_long = first["type"] == "int_parsing_size"
        message = "is too large" if is_too_long else first["msg"].replace("Input should be", "has to be")
        value = first["input"] if isinstance(first["input"], int) else f"{first['input']:g}"
        return f"{where}.{first['loc'][0]}: {value} {message}"
    cause = first["ctx"]["error"]
    reason = str(cause)
    if isinstance(cause, WrongActivation) and len(values(alternative["activation"])) > 1:
        reason += "; write one alternative per activation, as a list of mappings"
    return f"{where}: {reason}"


def _suggestion(word: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
