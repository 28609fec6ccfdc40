"""What one training of a pair mask may differ in from the others of its study."""

from typing import Literal, Self

from pydantic import Field, model_validator

from qkmodel.schema import Schema

Form = Literal["sqrt", "hard_concrete"]
JOINT_LEARNING_RATE, SETTLED_SHARE = 4e-3, 0.3


class MaskHyperparameters(Schema):
    """One mask's hyperparameters.

    `dictionary` names the dictionary whose pairs are masked: the first 16 digits of its SHA-256. `pair_cost` is in nats
    of the layer's KL: what a pair has to save to be kept. With `joint` decoder rows and output biases are trained
    along, at `joint_learning_rate` (4e-3 unless given), and go on for the last `settled_share` (0.3) of the steps,
    after the choice of pairs is made; activations stay as they are. With `encoders` encoder rows and biases are trained
    so too, and features become others than the dictionary's. `seed` is the chance of `hard_concrete`.
    """

    dictionary: str = Field(pattern=r"^[0-9a-f]{16}$")
    form: Form = "sqrt"
    pair_cost: float = Field(gt=0)
    learning_rate: float = Field(default=0.03, gt=0)
    joint: bool = False
    encoders: bool = False
    joint_learning_rate: float | None = Field(default=None, gt=0)
    settled_share: float | None = Field(default=None, ge=0, lt=1)
    seed: int = Field(default=0, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _of_its_kind(self) -> Self:
        # what does not apply would make the same training twice
        of_joint = (self.joint_learning_rate is not None, self.settled_share is not None, self.encoders)
        if not self.joint and any(of_joint):
            raise ValueError(
                "encoders, joint_learning_rate and settled_share belong to joint: true; write one alternative for each "
                "value of joint, as a list of mappings"
            )
        if self.form != "hard_concrete" and self.seed != 0:
            raise ValueError("seed belongs to form hard_concrete: nothing else of a mask is left to chance")
        return self

    @property
    def joint_rate(self) -> float:
        return JOINT_LEARNING_RATE if self.joint_learning_rate is None else self.joint_learning_rate

    @property
    def share_settled(self) -> float:
        """Of the steps, those after the choice of pairs."""
        if not self.joint:
            return 0.0
        return SETTLED_SHARE if self.settled_share is None else self.settled_share
