"""The parts of a sweep file that say what to try, how much of it, and what to stop early."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_serializer, field_validator, model_validator

from orchestrator.search.allocation import Allocation
from orchestrator.search.halving import Halving, default_rungs
from orchestrator.search.space import Alternative, Scalar, canonical, contains
from orchestrator.search.space_checks import validate_space
from qkmodel.configs import Number, Text, WholeNumber
from qkmodel.errors import InputError
from qkmodel.schema import Schema
from qkmodel.tasks import Task, task_of

# What a front may be bounded in: means over validation tokens, defined in qkmodel/evaluation.py.
Metric = Literal[
    "kl",
    "kl_recovered",
    "kl_no_bos",
    "kl_recovered_no_bos",
    "l0",
    "l0_query",
    "l0_key",
    "top1",
    "max_error",
    "dead_query",
    "dead_key",
    "dense_query",
    "dense_key",
    "ce_recovered",
]
# The same for pair masks: defined in qkmodel/pair_mask/evaluation.py.
MaskMetric = Literal[
    "kl_masked",
    "kl_masked_recovered",
    "mask_recovered",
    "pairs_kept",
    "pairs_share",
    "pairs_share_active",
    "unpaired_query",
    "unpaired_key",
    "ce_recovered",
]
METRICS: dict[Task, tuple[str, ...]] = {"transcoder": get_args(Metric), "pair_mask": get_args(MaskMetric)}
# `halving: auto` leaves smaller searches alone
LEAST_HALVED = 20
_UNIT_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)", re.ASCII)


class Bounds(Schema):
    """The least and the largest value that a metric may have; at least one of them."""

    min: Number | None = None
    max: Number | None = None

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("needs min, max or both, as in {max: 64}")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}; nothing would be left")
        return self


def _seconds(value: object) -> object:
    """`90 min`, `1 h 30 min`, or a number of seconds."""
    if not isinstance(value, str):
        return value
    parts = _TIME.findall(value)
    if not parts or _TIME.sub("", value).strip():
        raise ValueError("must be a time such as 90 min, 8 h or 1 d 12 h")
    return sum(float(number) * _UNIT_SECONDS[unit] for number, unit in parts)


class SearchConfig(Schema):
    """What to try. `trainings` is the budget of one layer; `space` holds one or more alternatives.

    In an alternative a value fixes a hyperparameter, a list chooses, a mapping is a range. `tokens`, `device_hours` and
    `wall_time` (seconds) bound the whole sweep, all its starts together: whichever ends first. Given `tokens`, those
    that are left once all trainings were begun go to the best of those that halving stopped. `first` are points to
    try before all others, and `warm_start` a sweep whose fronts are tried after them. With `layer_allocation:
    by_progress` layers share one budget, and those get more whose front still moves.
    """

    sampler: Literal["auto", "grid", "random", "tpe", "gp", "nsga2"] = "auto"
    trainings: WholeNumber = Field(gt=0, le=100_000, examples=[8])
    tokens: WholeNumber | None = Field(default=None, gt=0)
    device_hours: Number | None = Field(default=None, gt=0)
    wall_time: Annotated[Number | None, BeforeValidator(_seconds)] = Field(default=None, gt=0)
    space: tuple[Alternative, ...] = Field(examples=[{"dictionary_size": 512, "activation": "topk", "k": 16}])
    first: tuple[dict[str, Scalar], ...] = ()
    warm_start: Text | None = None
    constraints: dict[Metric | MaskMetric, Bounds] = Field(default_factory=dict)
    layer_allocation: Allocation = "even"

    @field_validator("space", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        if isinstance(value, dict):
            return (value,)
        if not isinstance(value, list | tuple):
            raise ValueError("must be a mapping of hyperparameters, or a list of such mappings")
        return value

    @model_validator(mode="after")
    def _searchable(self) -> Self:
        validate_space(self.space, self.sampler, self.trainings)
        if self.sampler == "grid" and (self.first or self.warm_start is not None):
            key = "first" if self.first else "warm_start"
            raise InputError(
                f"search.{key}: a grid visits every point anyway; leave {key} out or choose another sampler"
            )
        if self.first and task_of(self.space[0]) == "pair_mask":
            raise InputError("search.first: belongs to task transcoder; leave it out")
        for number, point in enumerate(self.first):
            self._check_inside(f"search.first.{number}", point)
        return self

    def _check_inside(self, key: str, point: Mapping[str, Any]) -> None:
        try:
            full = canonical(point)
        except ValueError as error:
            # pydantic's message has the reason in its second line
            lines = str(error).splitlines()
            reason = next((line.strip() for line in lines[1:] if line.startswith("  ")), lines[0]).partition(" [")[0]
            raise InputError(f"{key}: is no training: {reason.removeprefix('Value error, ')}") from None
        if not any(contains(alternative, full) for alternative in self.space):
            raise InputError(f"{key}: is outside search.space; give every hyperparameter a value that the space allows")

    @field_serializer("space", mode="wrap")
    def _as_written(self, space: tuple[Alternative, ...], dump: Any) -> Any:
        alternatives = dump(space)
        return alternatives[0] if len(alternatives) == 1 else alternatives

    @property
    def bounds(self) -> dict[str, tuple[float | None, float | None]]:
        """Metric -> (least, largest)."""
        return {metric: (bounds.min, bounds.max) for metric, bounds in self.constraints.items()}


class HalvingConfig(Schema):
    """At each of the `rungs` (tokens) the best 1/`eta` of a study's trainings of one family go on.

    Without `rungs` there are three, at an eighteenth, a sixth and a third of a training.
    """

    eta: Number = Field(default=3, ge=1.5, le=100)
    rungs: tuple[Annotated[WholeNumber, Field(gt=0)], ...] | None = Field(default=None, min_length=1)

    @field_validator("rungs")
    @classmethod
    def _ascending(cls, rungs: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if rungs is not None and list(rungs) != sorted(set(rungs)):
            raise ValueError("must be tokens in ascending order, each once")
        return rungs


def _form_of_halving(halving: object) -> str:
    return "mapping" if isinstance(halving, dict | HalvingConfig) else "word"


def _auto_or_null(halving: object) -> object:
    if halving is not None and halving != "auto":
        raise ValueError("must be auto, null, or a mapping such as {eta: 3, rungs: [50_000, 100_000]}")
    return halving


# The form is read off first, so that an error speaks of that form alone.
HalvingSetting = Annotated[
    Annotated[HalvingConfig, Tag("mapping")]
    | Annotated[Literal["auto"] | None, BeforeValidator(_auto_or_null), Tag("word")],
    Discriminator(_form_of_halving),
]


def resolve_halving(
    setting: HalvingConfig | str | None, sampler: str, trainings: int, steps: int, tokens_per_step: int
) -> Halving | None:
    """What `halving` comes to for trainings of so many steps, `trainings` of them per layer.

    `auto` is η = 3 for a search that proposes at least 20: a grid is asked for as a whole, and of fewer trainings no
    third is worth the name.
    """
    if setting == "auto":
        setting = HalvingConfig() if trainings >= LEAST_HALVED and sampler != "grid" else None
    if setting is None:
        return None
    rungs = default_rungs(steps) if setting.rungs is None else rung_steps(setting.rungs, steps, tokens_per_step)
    return Halving(setting.eta, rungs) if rungs else None


def rung_steps(rungs: Sequence[int], steps: int, tokens_per_step: int) -> tuple[int, ...]:
    """The steps nearest to rungs given in tokens; those at a training's end are none."""
    nearest = {max(1, round(tokens / tokens_per_step)) for tokens in rungs}
    return tuple(sorted(rung for rung in nearest if rung < steps))
