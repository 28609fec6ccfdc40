"""Sweep files for tests that load no model: the bundled model's description, a few small text files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

TOPK_GRID: dict[str, Any] = {
    "dictionary_size": [128, 256],
    "activation": "topk",
    "k": [8, 16],
    "learning_rate": 6e-3,
}


def write_corpus(folder: Path) -> Path:
    """Twelve small text files in `folder/text`."""
    corpus = folder / "text"
    corpus.mkdir(exist_ok=True)
    for number in range(12):
        (corpus / f"{number:02d}.txt").write_text(f"Text {number} of twelve. " * 20)
    return corpus


def write_sweep(folder: Path, *, search: Mapping[str, Any] | None = None, **keys: Any) -> Path:
    """A sweep file in `folder` whose storage is below it; `keys` replace its top-level keys.

    As it stands: layers 1 and 2 of SmolLM2, a TopK grid of four points, 4,096 tokens a training.
    """
    sweep = {
        "name": "small",
        "model": "smollm2-135m",
        "layers": [1, 2],
        "corpus": {"name": str(write_corpus(folder)), "bos": "<|endoftext|>"},
        "training": {"tokens": 4096, "validation_sequences": 16, "cross_entropy_sequences": 2},
        "search": {"sampler": "grid", "trainings": 4, "space": TOPK_GRID, **(search or {})},
        "storage": str(folder / "runs"),
    }
    file = folder / "sweep.yaml"
    OmegaConf.save(OmegaConf.create(sweep | keys), file)
    return file
