"""What one training may differ in from the others of its study."""

from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from qkmodel.schema import Schema

Activation = Literal["relu", "topk", "batchtopk", "jumprelu"]
Penalty = Literal["l1", "sqrt", "tanh", "p_annealing"]

# Larger ones would not fit any machine's memory.
LARGEST_DICTIONARY = 2**20


class WrongActivation(ValueError):
    """A training would be sound with another activation: it has what this one does not take, or lacks what it needs."""


class SideHyperparameters(Schema):
    """What the query or the key transcoder is made with."""

    dictionary_size: int
    activation: Activation
    k: int | None
    penalty: Penalty | None
    sparsity_coefficient: float | None
    target_l0: float | None


class Hyperparameters(Schema):
    """One training's hyperparameters.

    `k` (features kept per token) belongs to `topk` and `batchtopk`; `penalty` to `relu`; `sparsity_coefficient` (λ of
    the loss) to `relu` and `jumprelu`, in place of which `relu` takes `target_l0` (active features per token that λ is
    steered to).
    `dictionary_size`, `k`, `sparsity_coefficient` and `target_l0` hold for both sides, unless `key_…` gives the key
    side its own. `seed` moves the initialisation only; the order of the data depends on the sweep's seed.
    """

    dictionary_size: int = Field(ge=1, le=LARGEST_DICTIONARY)
    key_dictionary_size: int | None = Field(default=None, ge=1, le=LARGEST_DICTIONARY)
    activation: Activation
    k: int | None = Field(default=None, ge=1)
    key_k: int | None = Field(default=None, ge=1)
    penalty: Penalty | None = None
    sparsity_coefficient: float | None = Field(default=None, ge=0)
    key_sparsity_coefficient: float | None = Field(default=None, ge=0)
    target_l0: float | None = Field(default=None, gt=0)
    key_target_l0: float | None = Field(default=None, gt=0)
    learning_rate: float = Field(gt=0)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @property
    def query_side(self) -> SideHyperparameters:
        return self._side(key=False)

    @property
    def key_side(self) -> SideHyperparameters:
        return self._side(key=True)

    def _side(self, key: bool) -> SideHyperparameters:
        def of(name: str) -> float | None:
            own = getattr(self, f"key_{name}") if key else None
            return getattr(self, name) if own is None else own

        return SideHyperparameters(
            dictionary_size=of("dictionary_size"),
            activation=self.activation,
            k=of("k"),
            penalty=self.penalty,
            sparsity_coefficient=of("sparsity_coefficient"),
            target_l0=of("target_l0"),
        )

    @model_validator(mode="after")
    def _match_activation(self) -> Self:
        if self.activation in ("topk", "batchtopk"):
            self._check_k()
        else:
            self._check_penalty()
        return self

    def _check_k(self) -> None:
        if self.k is None:
            raise WrongActivation(f"activation {self.activation} needs k, the number of features kept per token")
        if self.penalty is not None or self._given("sparsity_coefficient", "target_l0"):
            raise WrongActivation(
                f"activation {self.activation} takes k; penalty, sparsity_coefficient and target_l0 belong to relu"
            )
        for side, name in ((self.query_side, ""), (self.key_side, "key_")):
            if side.k > side.dictionary_size:
                raise ValueError(f"{name}k {side.k} is larger than {name}dictionary_size {side.dictionary_size}")

    def _check_penalty(self) -> None:
        if self._given("k"):
            raise WrongActivation(
                f"k belongs to activations topk and batchtopk; {self.activation} takes "
                + ("penalty and sparsity_coefficient" if self.activation == "relu" else "sparsity_coefficient")
            )
        if self.activation == "jumprelu" and self.penalty is not None:
            raise WrongActivation("activation jumprelu takes no penalty: it counts active features itself")
        if self.activation == "jumprelu" and self._given("target_l0"):
            raise WrongActivation("target_l0 belongs to activation relu; jumprelu takes sparsity_coefficient")
        for name in ("sparsity_coefficient", "target_l0"):
            if getattr(self, f"key_{name}") is not None and getattr(self, name) is None:
                raise ValueError(f"key_{name} needs {name}, the query side's")
        self._check_what_relu_and_jumprelu_need()
        for side, name in ((self.query_side, ""), (self.key_side, "key_")):
            if side.target_l0 is not None and side.target_l0 >= side.dictionary_size:
                raise ValueError(
                    f"{name}target_l0 {side.target_l0:g} is not below {name}dictionary_size {side.dictionary_size}"
                )

    def _check_what_relu_and_jumprelu_need(self) -> None:
        lacking = []
        if self.activation == "relu" and self.penalty is None:
            lacking.append(f"penalty ({', '.join(get_args(Penalty))})")
        if self.sparsity_coefficient is None and self.target_l0 is None:
            lacking.append("sparsity_coefficient" + (", or target_l0 instead" if self.activation == "relu" else ""))
        if lacking:
            raise WrongActivation(f"activation {self.activation} needs {' and '.join(lacking)}")
        if self.sparsity_coefficient is not None and self.target_l0 is not None:
            raise ValueError("sparsity_coefficient and target_l0 exclude each other; keep one")

    def _given(self, *names: str) -> bool:
        return any(getattr(self, prefix + name) is not None for name in names for prefix in ("", "key_"))
