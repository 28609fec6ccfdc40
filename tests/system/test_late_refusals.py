"""What only the tokeniser can find wrong with a sweep file is still refused before anything is on disk."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_house import ROOT

COMMAND = (sys.executable, "-m", "orchestrator.cli", "sweep")
pytestmark = pytest.mark.system


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ('corpus.bos="<|nothing|>"', ["corpus.bos", "<|nothing|>"]),
        ("activations.max_bytes=1MB", ["activations.max_bytes", "1.0 MB"]),
        ("training.validation_sequences=100000", ["training.validation_sequences", "100000", "ask for at most"]),
    ],
)
def test_refused_with_nothing_created(tmp_path: Path, override: str, words: list[str]) -> None:
    answer = subprocess.run(
        # a named token: one that is measured first is kept in the storage, whatever comes of the sweep
        [*COMMAND, str(ROOT / "sweeps" / "smoke.yaml"), 'corpus.bos="<|endoftext|>"', override],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 2, answer.stderr
    *_, last = answer.stderr.splitlines()
    assert last.startswith("error: ") and all(word in last for word in words), last
    assert "Traceback" not in answer.stderr
    assert list(tmp_path.iterdir()) == []
