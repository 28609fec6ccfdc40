"""What one training may differ in from the others of its study."""

from typing import Literal, Self

from pydantic import Field, model_validator

from qkmodel.schema import Schema

Activation = Literal["relu", "topk"]
Penalty = Literal["l1", "sqrt"]


class Hyperparameters(Schema):
    """One training's hyperparameters.

    `k` (features kept per token) belongs to `topk`; `penalty` and `sparsity_coefficient` (λ of the loss)
    belong to `relu`. `dictionary_size` is the number of features on each side. `seed` moves the
    initialisation only; the order of the data depends on the sweep's seed.
    """

    dictionary_size: int = Field(ge=1, le=2**20)
    activation: Activation
    k: int | None = Field(default=None, ge=1)
    penalty: Penalty | None = None
    sparsity_coefficient: float | None = Field(default=None, ge=0)
    learning_rate: float = Field(gt=0)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _match_activation(self) -> Self:
        if self.activation == "topk":
            if self.k is None:
                raise ValueError("activation topk needs k, the number of features kept per token")
            if self.k > self.dictionary_size:
                raise ValueError(f"k {self.k} is larger than dictionary_size {self.dictionary_size}")
            if self.penalty is not None or self.sparsity_coefficient is not None:
                raise ValueError("activation topk takes k; penalty and sparsity_coefficient belong to relu")
        else:
            if self.k is not None:
                raise ValueError("k belongs to activation topk; relu takes penalty and sparsity_coefficient")
            if self.penalty is None or self.sparsity_coefficient is None:
                raise ValueError("activation relu needs penalty and sparsity_coefficient")
        return self
