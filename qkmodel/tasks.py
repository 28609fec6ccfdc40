"""The two steps of the decomposition as things to train: each has its own hyperparameters."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from qkmodel.hyperparameters import Hyperparameters
from qkmodel.pair_mask.hyperparameters import MaskHyperparameters

Task = Literal["transcoder", "pair_mask"]
TaskHyperparameters = Hyperparameters | MaskHyperparameters
HYPERPARAMETERS: dict[Task, type[TaskHyperparameters]] = {
    "transcoder": Hyperparameters,
    "pair_mask": MaskHyperparameters,
}
_ONLY_OF_MASKS = MaskHyperparameters.model_fields.keys() - Hyperparameters.model_fields.keys()


def task_of(names: Iterable[str]) -> Task:
    """The task whose hyperparameters have these names; not all of them need be there."""
    return "transcoder" if _ONLY_OF_MASKS.isdisjoint(names) else "pair_mask"


def parse_hyperparameters(hyperparameters: Mapping[str, Any]) -> TaskHyperparameters:
    """Raises pydantic.ValidationError."""
    return HYPERPARAMETERS[task_of(hyperparameters)](**hyperparameters)


def defaults(task: Task) -> dict[str, Any]:
    """The hyperparameters that every training of a task has, and what they are unless given."""
    fields = HYPERPARAMETERS[task].model_fields.items()
    return {name: field.default for name, field in fields if not field.is_required() and field.default is not None}
