"""Which token opens every sequence: what `corpus.bos` says, or what was measured to suit the model best."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.config import SweepConfig
from qkmodel.corpus import BosChoice, choose_bos
from qkmodel.documents import CorpusDescription
from qkmodel.errors import InputError
from qkmodel.files import write_atomically
from qkmodel.model_description import ModelDescription

if TYPE_CHECKING:
    from qkmodel.language_model import LanguageModel

# What `corpus.bos` says while nobody has measured.
AUTO = "auto"


def opening_token(config: SweepConfig, file: Path) -> str | None:
    """The token, None for none, or AUTO when it is to be measured and `file` does not hold the measurement yet.

    Raises InputError when `file` is damaged.
    """
    if config.corpus.bos != AUTO or not file.exists():
        return config.corpus.bos
    try:
        return json.loads(file.read_text())["bos"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: no readable measurement of the opening token ({error}); delete the file") from error


def measurement_file(cache_root: Path, config: SweepConfig, model: ModelDescription, corpus: CorpusDescription) -> Path:
    """Where the measurement for this model, text and split is kept."""
    decides = [
        model.weights_sha256,
        model.tokenizer_sha256,
        corpus.sha256,
        config.corpus.context,
        config.corpus.validation_documents,
        config.seed,
    ]
    return cache_root / f"bos-{hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]}.json"


def measure_opening_token(
    config: SweepConfig, load_model: "Callable[[], LanguageModel]", say: Callable[[str], None]
) -> BosChoice:
    """Compares the candidates. Nothing is written: `keep_opening_token` does that once the sweep is known to be sound.

    Raises InputError as `choose_bos`.
    """
    say("measuring which token should open a sequence")
    choice = choose_bos(load_model(), config.corpus, config.seed)
    listed = ", ".join(f"{name} {value:.3f}" for name, value in choice.cross_entropies.items())
    say(f"corpus.bos: {choice.bos or 'none'} (nats per token: {listed})")
    return choice


def keep_opening_token(choice: BosChoice, file: Path) -> None:
    """Stores a measurement, with every candidate's cross-entropy, for the next start."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"bos": choice.bos, "cross_entropies": choice.cross_entropies}
    write_atomically(file, json.dumps(content, indent=1).encode())
