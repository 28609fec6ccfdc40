"""What the driver asks of a worker: one pack, and what the worker answers at every report."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from qkmodel.configs import TrainingConfig
from qkmodel.dictionary import CorpusIdentity, ModelIdentity
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.schema import Schema

# How the error of a training begins whose numbers ran away: trying it again would give the same.
DIVERGED = "its numbers ran away"


class MemberOrder(Schema):
    """One training to start or to continue."""

    training_id: str
    hyperparameters: Hyperparameters


class PackOrder(Schema):
    """Everything a worker needs to train a pack; paths are absolute.

    All members have done `steps_done` steps: 0 for new trainings, else what their checkpoints hold. With `streamed` the
    cache holds no training activations, and the pack computes them from the model.
    """

    pack_id: str
    members: tuple[MemberOrder, ...] = Field(min_length=1)
    steps_done: int = Field(ge=0)
    device: Literal["cpu", "cuda"]
    threads: int = Field(ge=1)
    sweep_folder: Path
    cache_folder: Path
    streamed: bool
    reference_file: Path
    model_identity: ModelIdentity
    corpus_identity: CorpusIdentity
    training: TrainingConfig
    seed: int


class MemberReport(Schema):
    """How one member stands after a stretch of training.

    `metrics` are the final ones when `dictionary` (a path relative to the sweep's folder) is set, and the
    training's progress before that. `error` says why a member was given up. `seconds` is the member's share of
    the time the pack took since the last report.
    """

    training_id: str
    tokens: int
    seconds: float
    metrics: dict[str, float | None]
    dictionary: str | None = None
    dictionary_sha256: str | None = None
    error: str | None = None


def checkpoint_path(sweep_folder: Path, training_id: str) -> Path:
    """Where the newest checkpoint of a training lies."""
    return sweep_folder / "checkpoints" / f"{training_id}.safetensors"


def dictionary_path(training_id: str) -> Path:
    """Where a training's dictionary lies, relative to the sweep's folder."""
    return Path("dictionaries") / training_id
