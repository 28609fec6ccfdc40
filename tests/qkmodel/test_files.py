import pytest

from qkmodel.files import write_atomically


def test_replaces_whole_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "record.json"
    write_atomically(path, b"old")
    write_atomically(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


def test_failed_write_keeps_the_old_content(tmp_path):
    path = tmp_path / "record.json"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "text, not bytes")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]
