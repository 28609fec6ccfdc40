"""Schemas of the configuration that decides what a training sees: model, corpus, activations, training.

They stand apart from the code they configure so that a sweep file is checked, and refused, without the
seconds it takes to import torch and transformers.
"""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, model_validator

from qkmodel.schema import Schema

_NUMBER = re.compile(r"[-+]?[0-9]+(_[0-9]+)*(\.[0-9]*)?(e[-+]?[0-9]+)?", re.IGNORECASE)


def _not_boolean(value: object) -> object:
    # Python, and with it pydantic, takes true for the number 1
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


def _written_as_number(value: object) -> object:
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        raise ValueError("must be a number, not text; leave the quotes out")
    return _not_boolean(value)


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must not hold line breaks or other control characters")
    return text


WholeNumber = Annotated[int, BeforeValidator(_written_as_number)]
Number = Annotated[float, BeforeValidator(_written_as_number)]
Size = Annotated[ByteSize, BeforeValidator(_not_boolean)]
Text = Annotated[str, Field(min_length=1), AfterValidator(_printable)]


class ModelConfig(Schema):
    """Which language model to explain: a bundled name, a hub name or a local folder.

    `revision` is a branch, tag or commit on the hub. Code that ships with the weights runs only with
    `trust_remote_code`; pickled weights load only with `safetensors_only` set to false.
    """

    name: Text = Field(examples=["smollm2-135m"])
    revision: Text | None = None
    trust_remote_code: bool = False
    safetensors_only: bool = True


class CorpusConfig(Schema):
    """Which text to read, and how it becomes sequences of `context` tokens.

    `name` is a bundled corpus, a hub data set or a local file. `validation_documents` is the share of
    documents held out. `bos` opens every sequence: a token's text, None for none, or "auto" for the
    token with which the model predicts this text best. `subset` and `split` select within a data set.
    """

    name: Text = Field(examples=["sotu"])
    context: WholeNumber = Field(default=128, ge=3, le=2**20)
    validation_documents: Number = Field(default=0.1, gt=0, lt=1)
    bos: str | None = Field(default="auto", min_length=1)
    text_field: Text = "text"
    split: Text = "train"
    subset: Text | None = None


class ActivationsConfig(Schema):
    """How activations are cached: element type and the most bytes on disk, all layers together.

    `node_folder` is a folder on the own disk of every node that trains; what its packs read of the cache is copied
    there, `node_max_bytes` at most.
    """

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    max_bytes: Size = Field(default=ByteSize(20_000_000_000), gt=0)
    node_folder: Text | None = Field(default=None, pattern="^[/~]", examples=["/scratch/qk"])
    node_max_bytes: Size = Field(default=ByteSize(100_000_000_000), gt=0)


class TrainingConfig(Schema):
    """What every training of a study shares, and what therefore makes trainings comparable.

    `tokens` is the length of one training; `report_tokens` the interval of reports and checkpoints
    (None: an eighth of `tokens`). Batches hold whole sequences, since the loss compares whole attention
    patterns. At most `cross_entropy_sequences` of the validation sequences are also run through the model
    with the reconstructed pattern patched in (0: those metrics are left out). `warmup_share` is the share of
    the tokens over which the learning rate rises from 0; `gradient_clip` the largest norm of a training's
    gradient (None: any). `precision` is that of matrix products: `auto` is bfloat16 where the machine
    multiplies it faster.
    """

    tokens: WholeNumber = Field(gt=0, le=10**12, examples=[100_000])
    batch_sequences: WholeNumber = Field(default=8, gt=0, le=2**16)
    validation_sequences: WholeNumber = Field(default=200, gt=0, le=10**6)
    report_tokens: WholeNumber | None = Field(default=None, gt=0)
    cross_entropy_sequences: WholeNumber = Field(default=8, ge=0)
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_share: Number = Field(default=0.0, ge=0, le=0.5)
    gradient_clip: Number | None = Field(default=None, gt=0)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    def report_steps(self, tokens_per_step: int) -> int:
        """Steps from one report to the next."""
        return max(1, round((self.report_tokens or self.tokens / 8) / tokens_per_step))

    @property
    def patched_sequences(self) -> int:
        """Validation sequences on which the reconstructed pattern is patched into the model."""
        return min(self.cross_entropy_sequences, self.validation_sequences)

    @model_validator(mode="after")
    def _report_within_training(self) -> Self:
        if self.report_tokens is not None and self.report_tokens > self.tokens:
            raise ValueError(
                f"report_tokens {self.report_tokens} is more than tokens {self.tokens}; "
                "it is an interval within one training"
            )
        return self
