"""Following a log: everything once, and a cluster that falls silent for a moment."""

import itertools
from pathlib import Path

import pytest

from orchestrator.cluster import log_file
from orchestrator.cluster.log_file import follow_file
from qkmodel.errors import InputError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_file, "PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(log_file, "CHECK_SECONDS", 0.002)


def test_a_hiccup_of_the_cluster_does_not_end_it(tmp_path: Path) -> None:
    path, asked = tmp_path / "log", itertools.count()

    def is_over() -> bool:
        number = next(asked)
        with path.open("a") as file:
            file.write(f"{number}\n")
        if number in (1, 2):
            raise InputError("squeue: no answer")
        return number == 4

    assert "".join(follow_file(path, True, is_over)) == "0\n1\n2\n3\n4\n"


def test_a_cluster_that_never_answered_is_told_at_once_and_one_that_stays_silent_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = itertools.count()

    def is_over() -> bool:
        if next(asked):
            raise InputError("squeue: no answer")
        return False

    monkeypatch.setattr(log_file, "HICCUP_SECONDS", 0.05)
    with pytest.raises(InputError, match="no answer"):
        list(follow_file(tmp_path / "log", True, is_over))
    assert (times := next(asked)) > 3
    with pytest.raises(InputError, match="no answer"):
        list(follow_file(tmp_path / "log", True, is_over))
    assert next(asked) == times + 2


def test_what_is_there_is_read_without_asking(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("half a line")

    def is_over() -> bool:
        raise AssertionError

    assert list(follow_file(tmp_path / "log", False, is_over)) == ["half a line"]
