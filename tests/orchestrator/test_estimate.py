"""What a dry run measures, on a small model with random weights."""

from pathlib import Path

import pytest

from orchestrator.config import load_sweep
from orchestrator.estimate import estimate
from orchestrator.late_checks import check_plan
from orchestrator.plan import make_plan
from orchestrator.plan_tables import estimate_lines
from tests.orchestrator.sweep_files import write_corpus, write_sweep
from tests.qkmodel.random_models import CONFIGS, VOCABULARY, save_random_model


@pytest.mark.parametrize("batch", [1, 4])
def test_evaluation_is_reckoned_by_its_sequences(tmp_path: Path, batch: int) -> None:
    save_random_model(CONFIGS["llama3"], tmp_path / "model")
    file = write_sweep(
        tmp_path,
        model=str(tmp_path / "model"),
        layers=[1],
        corpus={"name": str(write_corpus(tmp_path)), "context": 16, "bos": None, "validation_documents": 0.5},
        training={
            "tokens": 3200,
            "report_tokens": 320,
            "batch_sequences": batch,
            "validation_sequences": 12,
            "cross_entropy_sequences": 0,
        },
    )
    found = estimate(check_plan(make_plan(load_sweep(file)), lambda _: None))
    # 200 sequences trained on; 9 reports on 8 and the last on 12
    assert found.evaluation_seconds / found.training_seconds == pytest.approx((9 * 8 + 12) / 200)


def test_a_vocabulary_under_a_thousand_words_and_a_short_corpus(tmp_path: Path) -> None:
    assert VOCABULARY < 1000
    save_random_model(CONFIGS["llama3"], tmp_path / "model")
    text = {"name": str(write_corpus(tmp_path)), "context": 16, "bos": None, "validation_documents": 0.5}
    file = write_sweep(
        tmp_path,
        model=str(tmp_path / "model"),
        layers=[1],
        corpus=text,
        # more than the twelve texts hold
        training={"tokens": 100_000, "validation_sequences": 8, "cross_entropy_sequences": 2},
    )
    said: list[str] = []
    checked = check_plan(make_plan(load_sweep(file)), said.append)
    found = estimate(checked)
    # 12 texts of 80 words: 60 sequences of 16 words in all, each of 4 bytes a token and 2 x 32 an activation
    assert found.cache_bytes == found.cache.bytes == 60 * 16 * (4 + 2 * 32)
    assert found.cache.sequences == 60 and found.seconds > 0
    assert any("activation cache 65.3 kB" in line for line in estimate_lines(checked.plan, found))
    assert not (tmp_path / "runs").exists()
