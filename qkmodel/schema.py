"""The base of every configuration and every record that is read from outside."""

from pydantic import BaseModel, ConfigDict


class Schema(BaseModel):
    """Frozen, unknown keys refused, NaN and infinity refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
