"""Where checkpoints lie, which one a training goes on from, and which are no longer needed.

A training's folder holds its last two checkpoints, so that a damaged one costs one interval and no more. A name carries
the number of the sweep's start: what a worker of a dead driver still writes replaces nothing.
"""

import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

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

    def __init__(self, sweep_folder: Path) -> None:
        self._folder = sweep_folder

    def whole(self, training_id: str) -> Iterator[tuple[Path, CheckpointHeader]]:
        """See `whole_checkpoints`."""
        return whole_checkpoints(self._folder, training_id)

    def discard(self, training_id: str) -> None:
        """Removes all of a training that has ended, damaged ones too."""
        shutil.rmtree(_folder(self._folder, training_id), ignore_errors=True)


def newest_checkpoint(sweep_folder: Path, training_id: str) -> tuple[Path, CheckpointHeader] | None:
    """The first of `whole_checkpoints`; None where there is none."""
    return next(whole_checkpoints(sweep_folder, training_id), None)


def whole_checkpoints(sweep_folder: Path, training_id: str) -> Iterator[tuple[Path, CheckpointHeader]]:
    """A training's checkpoints that are whole, and what they say of themselves, the farthest first.

    Each is read when it is asked for. Damaged ones, and those of another training, are put aside. Raises OSError when
    one cannot be read at all, and UnknownFormat.
    """
    for path in _farthest_first(_folder(sweep_folder, training_id)):
        try:
            yield path, read_checkpoint_header(path, training_id)
        except UnknownFormat:
            # whole, and the work of many hours perhaps: not ours to put aside
            raise
        except InputError as error:
            aside = path.with_name(f"{path.name}.damaged")
            # without its advice, which is for whoever has to put it aside
            wrong, _, _ = str(error).rpartition("; ")
            _log.warning("%s; it is kept as %s and the training goes on from the one before it", wrong, aside.name)
            path.replace(aside)


def drop_older(path: Path) -> None:
    """Removes what need not be kept beside the checkpoint that was just written to `path`."""
    others = [other for other in _farthest_first(path.parent) if other != path]
    for other in others[KEPT - 1 :]:
        other.unlink(missing_ok=True)


def _folder(sweep_folder: Path, training_id: str) -> Path:
    return sweep_folder / CHECKPOINTS_FOLDER / training_id


def _farthest_first(folder: Path) -> list[Path]:
    """By steps, of equal ones that of the latest start first."""
    found = [(match, path) for path in folder.glob("*.safetensors") if (match := _NAME.fullmatch(path.name))]
    found.sort(key=lambda one: (int(one[0]["steps"]), int(one[0]["start"])), reverse=True)
    return [path for _, path in found]
