"""What makes a study and a training the same as one the ledger already holds."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from orchestrator.config import PairMaskConfig
from orchestrator.search.space import canonical
from qkmodel.configs import CorpusConfig, TrainingConfig

IDENTITY_FORMAT = 2


def study_identity(
    *,
    task: str,
    weights_sha256: str,
    tokenizer_sha256: str,
    layer: int,
    corpus: CorpusConfig,
    corpus_sha256: str,
    bos: str | None,
    training: TrainingConfig,
    dtype: str,
    seed: int,
    pair_mask: PairMaskConfig | None = None,
    attempt: int = 0,
) -> dict[str, Any]:
    """Everything but the hyperparameters that can change a training's result, as JSON-able values.

    Names and places of files are left out (their content's hash is in), and `training.report_tokens`, which
    moves only when progress is reported. Of `pair_mask` that is which pairs are candidates; whose pairs they are is a
    hyperparameter. `bos` is the opening token that `corpus.bos` resolved to. An `attempt` after
    the first is part of it, so that nothing of the earlier ones counts.
    """
    identity = {
        "format": IDENTITY_FORMAT,
        "task": task,
        "weights_sha256": weights_sha256,
        "tokenizer_sha256": tokenizer_sha256,
        "layer": layer,
        "corpus": {
            "sha256": corpus_sha256,
            "bos": bos,
            "context": corpus.context,
            "validation_documents": corpus.validation_documents,
        },
        "training": training.model_dump(mode="json", exclude={"report_tokens"}),
        "dtype": dtype,
        "seed": seed,
    }
    if pair_mask is not None:
        identity["pair_mask"] = pair_mask.model_dump(mode="json", exclude={"dictionaries"})
    return identity | ({"attempt": attempt} if attempt else {})


def study_id(identity: Mapping[str, Any]) -> str:
    """Content hash of a study's identity, 16 hexadecimal digits."""
    return _digest(identity)


def training_id(study: str, hyperparameters: Mapping[str, Any]) -> str:
    """Content hash of a study and one set of hyperparameters, 16 hexadecimal digits.

    Defaults are filled in first, so leaving a hyperparameter out and writing its default are the same.
    """
    return _digest({"study": study, "hyperparameters": canonical(hyperparameters)})


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
