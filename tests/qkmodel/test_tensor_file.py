"""Tensor files: what is written comes back, damage is found, equal content is equal bytes."""

import pytest
import torch

from qkmodel.errors import InputError
from qkmodel.schema import Schema
from qkmodel.tensor_file import read_tensor_file, write_tensor_file


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
