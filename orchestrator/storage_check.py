"""What a sweep's storage must be. Apart, so that a job that only looks does without torch."""

import tempfile
from pathlib import Path

from qkmodel.errors import InputError

CACHE_FOLDER = "activations"
RESERVED_NAMES = (CACHE_FOLDER, "mlflow-artifacts", "jobs")


def check_storage(name: str, storage: Path) -> None:
    """Refuses a sweep's name, or a storage folder, that nothing could be written to. Leaves nothing behind."""
    if name in RESERVED_NAMES:
        raise InputError(f"name: {name} is taken by a folder of the storage itself; choose another")
    folder = storage / name
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir():
        raise InputError(f"storage: {there} is a file; give a folder, or a path where one can be made")
    try:
        # permissions alone do not tell: root may write everywhere, and /proc takes nothing
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(f"storage: {there} cannot be written to ({error.strerror}); give a folder that can") from error
