"""The on-disk dictionary: a finished training that a fresh process can load and trust.

A folder with `transcoder.safetensors`, `attention.safetensors` (the frozen projections that turn its output
into an attention pattern) and `config.json`. `config.json` is written last and records the SHA-256 of the
other two, so its own hash, `dictionary_sha256`, fixes all three.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from qkmodel.attention import AttentionGeometry, AttentionLayer
from qkmodel.configs import CorpusConfig, ModelConfig, TrainingConfig
from qkmodel.errors import InputError
from qkmodel.files import write_atomically
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.schema import Schema
from qkmodel.transcoder import QKTranscoder, empty_qk_transcoder

DICTIONARY_FORMAT: Literal[2] = 2
CONFIG_FILE = "config.json"
TRANSCODER_FILE = "transcoder.safetensors"
ATTENTION_FILE = "attention.safetensors"
FILES = (TRANSCODER_FILE, ATTENTION_FILE, CONFIG_FILE)


class ModelIdentity(Schema):
    """Which model the dictionary explains, and at which point of it; `config` loads the very same again."""

    config: ModelConfig
    weights_sha256: str
    layer: int = Field(ge=0)
    hook: str


class CorpusIdentity(Schema):
    """Which text it was trained on: the corpus block, the token that opened sequences, the content's hash."""

    config: CorpusConfig
    bos: str | None
    sha256: str


class DictionaryConfig(Schema):
    """Everything about a dictionary but its numbers."""

    format: Literal[2] = DICTIONARY_FORMAT
    training_id: str
    model: ModelIdentity
    geometry: AttentionGeometry
    corpus: CorpusIdentity
    training: TrainingConfig
    sweep_seed: int
    hyperparameters: Hyperparameters
    metrics: dict[str, float | None]
    versions: dict[str, str]
    git_sha: str | None
    files: dict[str, str] = Field(default_factory=dict, description="SHA-256 by file name")


@dataclass(frozen=True)
class Dictionary:
    """A loaded dictionary: `transcoder(x)` gives q̂ and k̂, `attention.pattern(…)` the pattern they make."""

    config: DictionaryConfig
    transcoder: QKTranscoder
    attention: AttentionLayer


def save_dictionary(folder: Path, transcoder: QKTranscoder, attention: AttentionLayer, config: DictionaryConfig) -> str:
    """Writes a dictionary and returns its SHA-256 (hex).

    `config.files` is filled in here. A kill at any moment leaves either no `config.json` or a whole dictionary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / TRANSCODER_FILE, save(transcoder.state_dict()))
    write_atomically(folder / ATTENTION_FILE, save(attention.to_tensors()))
    files = {name: _sha256((folder / name).read_bytes()) for name in (TRANSCODER_FILE, ATTENTION_FILE)}
    content = config.model_copy(update={"files": files}).model_dump_json(indent=1).encode()
    write_atomically(folder / CONFIG_FILE, content)
    return _sha256(content)


def load_dictionary(folder: Path | str, sha256: str | None = None) -> Dictionary:
    """Loads a dictionary from a folder, with every hash and every shape checked.

    `sha256` is what `save_dictionary` returned (the ledger keeps it); with it nothing in the folder needs to be
    trusted. Raises InputError naming the file when something is missing, damaged, tampered with or does not fit.
    """
    folder = Path(folder)
    content = _read(folder / CONFIG_FILE)
    if sha256 is not None and _sha256(content) != sha256:
        raise InputError(f"{folder / CONFIG_FILE}: hash is {_sha256(content)[:12]}…, recorded was {sha256[:12]}…")
    config = _parse_config(folder / CONFIG_FILE, content)
    tensors = {name: _checked_tensors(folder / name, config) for name in (TRANSCODER_FILE, ATTENTION_FILE)}
    attention = AttentionLayer.from_tensors(config.geometry, tensors[ATTENTION_FILE])
    with torch.device("meta"):
        # shapes alone: what a forged configuration asks for is compared before anything is allocated
        transcoder = empty_qk_transcoder(config.hyperparameters, attention)
    _fit(folder / TRANSCODER_FILE, transcoder, tensors[TRANSCODER_FILE])
    return Dictionary(config, transcoder.requires_grad_(False), attention)


def find_loss(folder: Path, sha256: str) -> str | None:
    """What of the dictionary recorded with this hash is gone or another from `folder`, in words; None if nothing is.

    Tensors are looked for and not read: `load_dictionary` checks them.
    """
    for name in FILES:
        if not (folder / name).is_file():
            return f"{folder / name} is gone"
    if _sha256((folder / CONFIG_FILE).read_bytes()) != sha256:
        return f"{folder / CONFIG_FILE} is not the one that was recorded"
    return None


def _parse_config(path: Path, content: bytes) -> DictionaryConfig:
    try:
        found = json.loads(content).get("format")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise InputError(f"{path}: not JSON as save_dictionary writes it ({error})") from error
    if found != DICTIONARY_FORMAT:
        raise InputError(f"{path}: dictionary format {found!r}; this version reads format {DICTIONARY_FORMAT}")
    try:
        return DictionaryConfig.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {where}: {first['msg']}") from error


def _checked_tensors(path: Path, config: DictionaryConfig) -> dict[str, Tensor]:
    content = _read(path)
    if _sha256(content) != config.files.get(path.name):
        raise InputError(f"{path}: hash differs from the one {CONFIG_FILE} records; the file is damaged or was changed")
    try:
        return load(content)
    except SafetensorError as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from error


def _fit(path: Path, transcoder: QKTranscoder, tensors: dict[str, Tensor]) -> None:
    expected = transcoder.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors or name not in expected:
            raise InputError(
                f"{path}: tensor {name} is {'missing' if name in expected else 'not part of a transcoder'}"
            )
        if tensors[name].shape != expected[name].shape or tensors[name].dtype != torch.float32:
            raise InputError(
                f"{path}: tensor {name} is {tensors[name].dtype} {tuple(tensors[name].shape)}; "
                f"the configuration needs float32 {tuple(expected[name].shape)}"
            )
    transcoder.load_state_dict(tensors, assign=True)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); a dictionary folder holds it") from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
