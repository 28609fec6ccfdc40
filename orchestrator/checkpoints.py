"""Where checkpoints lie, which one a training goes on from, and which are no longer needed.

A training's folder holds its last two checkpoints, so that a damaged one costs one interval and no more. A name carries
the number of the sweep's start: what a worker of a dead driver still writes replaces nothing.
"""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

from orchestrator.storage.shared import SHARED, Storage
from qkmodel.errors import InputError
from qkmodel.pack import CheckpointHeader, read_checkpoint_header
from qkmodel.tensor_file import UnknownFormat

KEPT = 2
CHECKPOINTS_FOLDER = "checkpoints"
_NAME = re.compile(r"(?P<start>\d+)-(?P<steps>\d+)\.safetensors")
_log = logging.getLogger(__name__)


def checkpoint_path(sweep_folder: Path, start: int, training_id: str, steps: int) -> Path:
    """Where the checkpoint lies that start number `start` of the sweep writes after `steps` steps."""
    return _folder(sweep_folder, training_id) / f"{start:04d}-{steps:08d}.safetensors"


class Checkpoints:
    """The checkpoints of a sweep, as the queue of packs needs them."""

    def __init__(self, sweep_folder: Path, storage: Storage = SHARED) -> None:
        self._folder = sweep_folder
        self._storage = storage

    def whole(self, training_id: str) -> Iterator[tuple[Path, CheckpointHeader]]:
        """See `whole_checkpoints`."""
        return whole_checkpoints(self._folder, training_id, self._storage)

    def discard(self, training_id: str) -> None:
        """Removes all of a training that has ended, damaged ones too."""
        self._storage.remove(_folder(self._folder, training_id))


def newest_checkpoint(sweep_folder: Path, training_id: str) -> tuple[Path, CheckpointHeader] | None:
    """The first of `whole_checkpoints`; None where there is none."""
    return next(whole_checkpoints(sweep_folder, training_id), None)


def whole_checkpoints(
    sweep_folder: Path, training_id: str, storage: Storage = SHARED
) -> Iterator[tuple[Path, CheckpointHeader]]:
    """A training's checkpoints that are whole, and what they say of themselves, the farthest first.

    Each is read when it is asked for. Damaged ones, and those of another training, are put aside. Raises OSError when
    one cannot be read at all, and UnknownFormat.
    """
    for path in _farthest_first(_folder(sweep_folder, training_id), storage):
        try:
            header = _read_header(path, training_id, storage)
        except UnknownFormat:
            # whole, and the work of many hours perhaps: not ours to put aside
            raise
        except InputError as error:
            aside = path.with_name(f"{path.name}.damaged")
            # without its advice, which is for whoever has to put it aside
            wrong, _, _ = str(error).rpartition("; ")
            _log.warning("%s; it is kept as %s and the training goes on from the one before it", wrong, aside.name)
            storage.move(path, aside)
        else:
            yield path, header


def _read_header(path: Path, training_id: str, storage: Storage) -> CheckpointHeader:
    with storage.borrowed(path) as file:
        try:
            return read_checkpoint_header(file, training_id)
        except InputError as error:
            # by its own name, whatever it was read as
            raise type(error)(str(error).replace(str(file), storage.shown(path))) from error


def drop_older(path: Path, storage: Storage = SHARED) -> None:
    """Removes what need not be kept beside the checkpoint that was just written to `path`."""
    others = [other for other in _farthest_first(path.parent, storage) if other != path]
    for other in others[KEPT - 1 :]:
        storage.remove(other)


def _folder(sweep_folder: Path, training_id: str) -> Path:
    return sweep_folder / CHECKPOINTS_FOLDER / training_id


def _farthest_first(folder: Path, storage: Storage) -> list[Path]:
    """By steps, of equal ones that of the latest start first."""
    found = [(match, folder / name) for name in storage.names(folder) if (match := _NAME.fullmatch(name))]
    found.sort(key=lambda one: (int(one[0]["steps"]), int(one[0]["start"])), reverse=True)
    return [path for _, path in found]
