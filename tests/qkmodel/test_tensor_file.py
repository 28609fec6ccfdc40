"""Tensor files: what is written comes back, damage is found, equal content is equal bytes."""

from typing import Literal

import pytest
import torch

from qkmodel.errors import InputError
from qkmodel.schema import Schema
from qkmodel.tensor_file import UnknownFormat, read_tensor_file, write_tensor_file


class Header(Schema):
    name: str
    steps: int


HEADER = Header(name="one", steps=3)
TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(1)}


def test_what_is_written_comes_back(tmp_path):
    write_tensor_file(tmp_path / "file", HEADER, TENSORS)
    header, tensors = read_tensor_file(tmp_path / "file", Header)
    assert header == HEADER
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        name: tensor.tolist() for name, tensor in TENSORS.items()
    }


def test_a_tensor_of_nothing_comes_back(tmp_path):
    # strides of 0, as numpy gives them to a product of nothing
    nothing = torch.empty(0, dtype=torch.int64).as_strided((0,), (0,))
    write_tensor_file(tmp_path / "file", HEADER, TENSORS | {"c": nothing})
    _, tensors = read_tensor_file(tmp_path / "file", Header)
    assert tensors["c"].shape == (0,) and tensors["c"].dtype == torch.int64


def test_equal_content_is_equal_bytes(tmp_path):
    written = set()
    for _ in range(20):
        write_tensor_file(tmp_path / "file", HEADER, TENSORS)
        written.add((tmp_path / "file").read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize("place", [20, -1])
def test_a_changed_byte_is_noticed(tmp_path, place):
    path = tmp_path / "file"
    write_tensor_file(path, HEADER, TENSORS)
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="delete it to start over"):
        read_tensor_file(path, Header)


class NumberedHeader(Header):
    format: Literal[1] = 1


def test_a_whole_file_of_another_format_is_not_called_damaged(tmp_path):
    newer = NumberedHeader.model_construct(name="one", steps=3, format=2)
    write_tensor_file(tmp_path / "file", newer, TENSORS)
    with pytest.raises(UnknownFormat, match="format 2; this version reads format 1"):
        read_tensor_file(tmp_path / "file", NumberedHeader)


@pytest.mark.parametrize("content", [b"", b"12345678", b"\x02" + bytes(7) + b"[]", b"\xff" * 100])
def test_what_is_no_tensor_file_is_named(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InputError, match=r"file: cannot be read"):
        read_tensor_file(tmp_path / "file", NumberedHeader)


def test_a_file_that_cannot_be_opened_is_not_called_damaged(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_tensor_file(tmp_path / "absent", Header)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        read_tensor_file(tmp_path / "folder", Header)


@pytest.mark.parametrize(
    "head",
    [
        '{"__metadata__": ["record"]}',
        '{"__metadata__": {"record": 3}}',
        '{"__metadata__": {"record": "[]"}}',
        '{"a": {"dtype": "F4", "shape": [0], "data_offsets": [0, 0]}}',
        "[" * 9999,
    ],
)
def test_a_head_that_nobody_wrote_is_called_damaged(tmp_path, head):
    (tmp_path / "file").write_bytes(len(head).to_bytes(8, "little") + head.encode())
    with pytest.raises(InputError, match="delete it to start over"):
        read_tensor_file(tmp_path / "file", Header)


def test_tensors_that_numpy_has_no_type_for_are_hashed_too(tmp_path):
    write_tensor_file(tmp_path / "file", HEADER, {"a": torch.ones(3, dtype=torch.bfloat16), "empty": torch.ones(0, 2)})
    _, tensors = read_tensor_file(tmp_path / "file", Header)
    assert tensors["a"].dtype == torch.bfloat16 and tensors["empty"].shape == (0, 2)
