"""The policy file of a replay: how the trainings of a sweep could have been chosen."""

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from orchestrator.search.allocation import Allocation
from orchestrator.search.config import HalvingSetting
from orchestrator.validation import explain
from orchestrator.yaml_file import read_mapping
from qkmodel.configs import WholeNumber
from qkmodel.errors import InputError
from qkmodel.schema import Schema


class Policy(Schema):
    """Keys mean what they mean in a sweep file, and are as there when left out, but for `pack`, which is a number.

    `trainings` per layer (None: as many as were recorded), `tokens` of the whole sweep, `packs_at_once` workers in
    virtual time.
    """

    sampler: Literal["auto", "grid", "random", "tpe", "gp", "nsga2"] = "auto"
    halving: HalvingSetting = "auto"
    pack: WholeNumber = Field(default=4, gt=0)
    trainings: WholeNumber | None = Field(default=None, gt=0)
    tokens: WholeNumber | None = Field(default=None, gt=0)
    layer_allocation: Allocation = "even"
    packs_at_once: WholeNumber = Field(default=2, gt=0)
    seed: WholeNumber = Field(default=0, ge=0, lt=2**32)


def load_policy(path: Path) -> Policy:
    """Raises InputError, one line."""
    data = read_mapping(path)
    try:
        return Policy.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{path}: {explain(error, data, Policy)}") from None
