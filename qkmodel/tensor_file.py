"""A safetensors file that says what it is and notices when it was damaged."""

import hashlib
import json
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from qkmodel.errors import InputError
from qkmodel.files import write_atomically
from qkmodel.schema import Schema

Header = TypeVar("Header", bound=Schema)
_RECORD = "record"
# what safetensors writes before its JSON head: the head's length
_LENGTH_BYTES = 8


class _Record(Schema, Generic[Header]):
    header: Header
    sha256: str


def write_tensor_file(path: Path, header: Schema, tensors: dict[str, Tensor]) -> None:
    """Writes tensors (any shapes), a header and the tensors' SHA-256, atomically; equal content is equal bytes."""
    tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    # One metadata key: safetensors writes several in an order that changes from process to process.
    record = _Record[type(header)](header=header, sha256=_sha256(tensors))
    write_atomically(path, save(tensors, {_RECORD: record.model_dump_json()}))


class UnknownFormat(InputError):
    """A whole file of a format that this version does not read: nothing to throw away."""


def read_tensor_file(path: Path, kind: type[Header]) -> tuple[Header, dict[str, Tensor]]:
    """What `write_tensor_file` wrote with a header of this kind.

    Raises UnknownFormat when the header's `format` is not the one that `kind` has, InputError when the file is
    damaged or of another kind, and OSError when it cannot be read at all, which says nothing about the file.
    """
    content = path.read_bytes()
    try:
        record = _read_record(content)
        tensors = load(content)
        _refuse_other_format(path, record, kind)
        parsed = _Record[kind].model_validate(record)
    except UnknownFormat:
        raise
    # KeyError: the format has element types that torch has not
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({str(error).splitlines()[0]}); delete it to start over") from error
    if parsed.sha256 != _sha256(tensors):
        raise InputError(f"{path}: damaged, its hash is not the recorded one; delete it to start over")
    return parsed.header, tensors


def _read_record(content: bytes) -> object:
    """The record of a safetensors file: a JSON text under one key of its metadata. Raises ValueError."""
    size = int.from_bytes(content[:_LENGTH_BYTES], "little")
    head = json.loads(content[_LENGTH_BYTES:][:size])
    metadata = head.get("__metadata__") if isinstance(head, dict) else None
    record = metadata.get(_RECORD) if isinstance(metadata, dict) else None
    return json.loads(record if isinstance(record, str) else "{}")


def _refuse_other_format(path: Path, record: object, kind: type[Schema]) -> None:
    known = kind.model_fields.get("format")
    header = record.get("header") if isinstance(record, dict) else None
    if known is None or not isinstance(header, dict):
        return
    if header.get("format") != known.default:
        raise UnknownFormat(
            f"{path}: format {header.get('format')!r}; this version reads format {known.default}: "
            "use the version that wrote it, or delete it to start over"
        )


def _sha256(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        # a tensor of nothing, such as the pairs of a mask that kept none, may have strides that no view takes
        if tensors[name].numel() > 0:
            digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
