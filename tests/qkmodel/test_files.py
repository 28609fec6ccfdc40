import os
import signal
import subprocess
import sys

import pytest

from qkmodel.errors import InputError
from qkmodel.files import exclusive, new_folder, write_atomically


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


HOLD = """
import sys, time
from pathlib import Path
from qkmodel.files import exclusive
with exclusive(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_names_its_holder_and_is_let_go_of_by_a_kill(tmp_path):
    class BusyError(Exception):
        pass

    def refuse(holder):
        raise BusyError(holder)

    lock = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(BusyError, match=f"^{other.pid}$"), exclusive(lock, refuse):
            pass
        other.send_signal(signal.SIGKILL)
    with exclusive(lock, refuse):
        assert lock.read_text() == str(os.getpid())


def test_a_new_folder_appears_whole(tmp_path):
    with new_folder(tmp_path / "deep" / "folder") as partial:
        (partial / "file").write_text("content")
        assert not (tmp_path / "deep" / "folder").exists()
    assert (tmp_path / "deep" / "folder" / "file").read_text() == "content"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["folder"]


def test_a_new_folder_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), new_folder(tmp_path / "folder") as partial:
        (partial / "file").write_text("content")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_filled_meanwhile_is_kept(tmp_path):
    with pytest.raises(OSError), new_folder(tmp_path / "folder"):
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "other").write_text("other")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder" / "other").read_text() == "other"


@pytest.mark.parametrize("place", ["file/folder", "x" * 255, "/proc/folder"])
def test_a_folder_that_cannot_be_made_is_refused_by_its_name(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written") as refused, new_folder(tmp_path / place):
        pass
    assert str(refused.value).startswith(f"{tmp_path / place}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
