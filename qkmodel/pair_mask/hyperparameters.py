"""What one training of a pair mask may differ in from the others of its study."""

from typing import Literal

from pydantic import Field

from qkmodel.schema import Schema

Form = Literal["sqrt", "hard_concrete"]


class MaskHyperparameters(Schema):
    """One mask's hyperparameters.

    `dictionary` names the dictionary whose pairs are masked: the first 16 digits of its SHA-256. `pair_cost` is in nats
    of the layer's KL: what a pair has to save to be kept. With `joint` decoder rows and output biases are trained
    along, at `decoder_learning_rate`, and go on for the last `settled_share` of the steps after the choice of pairs is
    made; activations stay as they are.
    """

    dictionary: str = Field(pattern=r"^[0-9a-f]{16}$")
    form: Form = "sqrt"
    pair_cost: float = Field(gt=0)
    learning_rate: float = Field(default=0.03, gt=0)
    joint: bool = False
    decoder_learning_rate: float = Field(default=1e-3, gt=0)
    settled_share: float = Field(default=0.3, ge=0, lt=1)
    seed: int = Field(default=0, ge=0, lt=2**31)
