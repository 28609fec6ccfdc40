"""What the driver asks of a worker: one pack, and what the worker answers at every report."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from qkmodel.configs import TrainingConfig
from qkmodel.dictionary import CorpusIdentity, ModelIdentity
from qkmodel.schema import Schema
from qkmodel.tasks import Task, TaskHyperparameters

# How the error of a training begins whose numbers ran away: trying it again would give the same.
DIVERGED = "its numbers ran away"
DICTIONARIES_FOLDER = "dictionaries"


class MemberOrder(Schema):
    """One training to start, or to continue from `checkpoint`."""

    training_id: str
    hyperparameters: TaskHyperparameters
    checkpoint: Path | None = None


class CopiesOrder(Schema):
    """Where a node keeps copies of what it reads of the activation cache, and how much of it.

    Without a folder they are below the user's cache folder there.
    """

    folder: Path | None
    max_bytes: int


class SourceOrder(Schema):
    """A dictionary whose pairs are masked: where it and its candidates lie, and on how much text these were found."""

    folder: Path
    sha256: str
    candidates: Path
    calibration_sequences: int


class BucketOrder(Schema):
    """The bucket that a sweep is kept in, and its working copy on the driver's machine."""

    url: str
    root: Path


class PackOrder(Schema):
    """Everything a worker needs to train a pack; paths are absolute, of a bucket's sweep those on the driver's machine.

    All members have done `steps_done` steps: 0 for new trainings, else what their checkpoints hold. The pack ends when
    they have done `last_step`, which is the training's last or that of a rung; where that is `steps_done` it only
    reports. `sources` are the dictionaries that pair masks name. With `streamed` the cache holds no training
    activations, and the pack computes them from the model. `start` is the number of the sweep's start that ordered it.
    """

    start: int
    pack_id: str
    task: Task
    members: tuple[MemberOrder, ...] = Field(min_length=1)
    steps_done: int = Field(ge=0)
    last_step: int = Field(ge=0)
    device: Literal["cpu", "cuda"]
    threads: int = Field(ge=1)
    bucket: BucketOrder | None = None
    sweep_folder: Path
    cache_folder: Path
    copies: CopiesOrder | None = None
    streamed: bool
    reference_file: Path
    sources: dict[str, SourceOrder] = Field(default_factory=dict)
    model_identity: ModelIdentity
    corpus_identity: CorpusIdentity
    training: TrainingConfig
    seed: int

    def rebased(self, root: Path) -> Self:
        """The same order with its paths in the working copy at `root`, that of another machine."""

        def moved(path: Path | None) -> Path | None:
            is_inside = path is not None and path.is_relative_to(self.bucket.root)
            return root / path.relative_to(self.bucket.root) if is_inside else path

        if self.bucket is None:
            return self
        members = tuple(one.model_copy(update={"checkpoint": moved(one.checkpoint)}) for one in self.members)
        sources = {
            name: one.model_copy(update={"folder": moved(one.folder), "candidates": moved(one.candidates)})
            for name, one in self.sources.items()
        }
        paths = {name: moved(getattr(self, name)) for name in ("sweep_folder", "cache_folder", "reference_file")}
        bucket = self.bucket.model_copy(update={"root": root})
        return self.model_copy(update={**paths, "bucket": bucket, "members": members, "sources": sources})


class MemberReport(Schema):
    """How one member stands after a stretch of training, which a signal may have cut short: then without `metrics`.

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


def dictionary_path(start: int, training_id: str) -> Path:
    """Where the dictionary lies that start number `start` writes of a training, relative to the sweep's folder.

    With the number, so that a worker of a dead driver cannot write into one that the ledger already records.
    """
    return Path(DICTIONARIES_FOLDER) / f"{training_id}-{start:04d}"
