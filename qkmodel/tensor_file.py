"""A safetensors file that says what it is and notices when it was damaged."""

import hashlib
from pathlib import Path
from typing import Generic, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from qkmodel.errors import InputError
from qkmodel.files import write_atomically
from qkmodel.schema import Schema

Header = TypeVar("Header", bound=Schema)
_RECORD = "record"


class _Record(Schema, Generic[Header]):
    header: Header
    sha256: str


def write_tensor_file(path: Path, header: Schema, tensors: dict[str, Tensor]) -> None:
    """Writes tensors (any shapes), a header and the tensors' SHA-256, atomically; equal content is equal bytes."""
    # One metadata key: safetensors writes several in an order that changes from process to process.
    record = _Record[type(header)](header=header, sha256=_sha256(tensors))
    write_atomically(path, save(tensors, {_RECORD: record.model_dump_json()}))


def read_tensor_file(path: Path, kind: type[Header]) -> tuple[Header, dict[str, Tensor]]:
    """What `write_tensor_file` wrote with a header of this kind.

    Raises InputError when the file is missing, damaged, or of another kind or format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        record = _Record[kind].model_validate_json(metadata.get(_RECORD, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({str(error).splitlines()[0]}); delete it to start over") from error
    if record.sha256 != _sha256(tensors):
        raise InputError(f"{path}: damaged, its hash is not the recorded one; delete it to start over")
    return record.header, tensors


def _sha256(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().contiguous().numpy().tobytes())
    return digest.hexdigest()
