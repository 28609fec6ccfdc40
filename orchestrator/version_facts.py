"""What a registered version says of itself in MLflow: where its dictionary comes from, as tags and as a description."""

from collections.abc import Mapping

from orchestrator.choice import Choice
from orchestrator.ledger_records import SweepRecord, Training
from orchestrator.tracking_store import SHA256_TAG, STUDY_TAG, SWEEP_TAG, TRAINING_TAG
from qkmodel.dictionary import DictionaryConfig


def description(training: Training, *tables: Mapping[str, str]) -> str:
    """Markdown, whose first line is what a table of versions shows of it."""
    rows = ["| | |\n|---|---|\n" + "\n".join(f"| {key} | `{value}` |" for key, value in one.items()) for one in tables]
    return "\n\n".join([training.label, *rows])


def provenance(sweep: SweepRecord, choice: Choice, config: DictionaryConfig) -> dict[str, str]:
    """Where the dictionary comes from, as tags."""
    study, training = choice.status.study, choice.training
    facts = {
        SWEEP_TAG: sweep.name,
        STUDY_TAG: study.study_id,
        TRAINING_TAG: training.training_id,
        SHA256_TAG: training.dictionary_sha256,
        "qk.layer": str(study.layer),
        "qk.model": study.model,
        "qk.model_weights_sha256": config.model.weights_sha256,
        "qk.corpus": study.corpus,
        "qk.corpus_sha256": config.corpus.sha256,
        "qk.source_sha256": config.pair_mask.source_sha256 if config.pair_mask is not None else None,
        "qk.git_sha": config.git_sha,
    }
    return {name: value for name, value in facts.items() if value is not None}
