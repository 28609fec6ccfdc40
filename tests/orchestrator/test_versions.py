"""What is recorded of the code that made a result."""

import subprocess
from pathlib import Path

import pytest

from orchestrator import versions


def test_a_recorded_diff_can_be_applied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file whose change is followed by empty lines, by somebody who likes colours."""

    def git(*arguments: str) -> None:
        author = ("-c", "user.name=n", "-c", "user.email=n@example.org")
        subprocess.run(["git", *author, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    git("config", "color.ui", "always")
    file = tmp_path / "code.py"
    file.write_text("a\nb\n\n\n\nc\n")
    git("add", "code.py")
    git("commit", "-m", "one")
    changed = "a\nB\n\n\n\nc\n"
    file.write_text(changed)
    monkeypatch.setattr(versions, "__file__", str(file))
    monkeypatch.setattr(versions, "git_sha", lambda: "abc")
    diff = versions.git_diff()
    git("checkout", "code.py")
    (tmp_path / "git.diff").write_text(diff)
    git("apply", "git.diff")
    assert file.read_text() == changed
