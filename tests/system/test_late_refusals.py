"""What only the tokeniser can find wrong with a sweep file is still refused before anything is on disk."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

from tests.orchestrator.sweep_files import write_corpus, write_sweep
from tests.qkmodel.random_models import save_random_model
from tests.test_house import ROOT

COMMAND = (sys.executable, "-m", "orchestrator", "sweep")
pytestmark = pytest.mark.system


NAMED = 'corpus.bos="<|endoftext|>"'


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (['corpus.bos="<|nothing|>"'], ["corpus.bos", "<|nothing|>"]),
        # not even the opening token, which is measured first here, is kept
        (["activations.max_bytes=1MB"], ["activations.max_bytes", "1.0 MB"]),
        ([NAMED, "activations.max_bytes=1MB", "--dry-run"], ["activations.max_bytes", "1.0 MB"]),
        ([NAMED, "training.validation_sequences=100000"], ["training.validation_sequences", "ask for at most"]),
    ],
)
def test_refused_with_nothing_created(tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    refused(tmp_path, words, str(ROOT / "sweeps" / "smoke.yaml"), *overrides)


@pytest.mark.parametrize(
    "dry_run", [[], pytest.param(["--dry-run"], marks=pytest.mark.slow)], ids=["started", "dry run"]
)
def test_attention_that_cannot_be_reproduced_is_refused_before_anything_is_cached(
    tmp_path: Path, dry_run: list[str]
) -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaConfig(**sizes, intermediate_size=48, max_position_embeddings=64, rope_parameters=dynamic)
    save_random_model(model, tmp_path / "model")
    text = {"name": str(write_corpus(tmp_path)), "context": 16, "bos": None, "validation_documents": 0.5}
    file = write_sweep(tmp_path, model=str(tmp_path / "model"), layers=[1], corpus=text, storage="runs")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", ["LlamaForCausalLM layer 1", "rotary scaling dynamic"], str(file), *dry_run)


def refused(cwd: Path, words: list[str], *arguments: str) -> None:
    """`orchestrate sweep …` says in one last line what is wrong, and leaves `cwd` empty."""
    answer = subprocess.run([*COMMAND, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 2, answer.stderr
    *_, last = answer.stderr.splitlines()
    assert last.startswith("error: ") and all(word in last for word in words), last
    assert "Traceback" not in answer.stderr
    assert list(cwd.iterdir()) == []
