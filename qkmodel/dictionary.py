"""The on-disk dictionary: a finished training that a fresh process can load and trust.

A folder with `transcoder.safetensors`, `attention.safetensors` (the frozen projections that turn its output
into an attention pattern), `pairs.safetensors` where its pairs are masked, and `config.json`. `config.json` is written
last and records the SHA-256 of the others, so its own hash, `dictionary_sha256`, fixes them all.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, ValidationError, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from qkmodel.attention import AttentionGeometry, AttentionLayer
from qkmodel.configs import CorpusConfig, ModelConfig, TrainingConfig
from qkmodel.errors import InputError
from qkmodel.evaluation import reconstructed_pattern
from qkmodel.files import write_atomically
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.pair_mask.evaluation import masked_pattern
from qkmodel.pair_mask.hyperparameters import MaskHyperparameters
from qkmodel.pair_mask.kept_pairs import KeptPairs
from qkmodel.schema import Schema
from qkmodel.transcoder import QKTranscoder, empty_qk_transcoder

DICTIONARY_FORMAT: Literal[2] = 2
CONFIG_FILE = "config.json"
TRANSCODER_FILE = "transcoder.safetensors"
ATTENTION_FILE = "attention.safetensors"
PAIRS_FILE = "pairs.safetensors"
TENSOR_FILES = (TRANSCODER_FILE, ATTENTION_FILE, PAIRS_FILE)
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


class PairMaskConfig(Schema):
    """How the pairs of a dictionary were chosen: by which training, from how many candidates, salient on which text.

    `source_sha256` is that of the dictionary whose pairs they are.
    """

    hyperparameters: MaskHyperparameters
    source_sha256: str
    training: TrainingConfig
    candidates: int
    salient: int
    calibration_sequences: int


class DictionaryConfig(Schema):
    """Everything about a dictionary but its numbers.

    Where its pairs are masked, `training_id`, `corpus`, `sweep_seed` and `metrics` are the mask's; `training` and
    `hyperparameters` stay those of the transcoders.
    """

    format: Literal[2] = DICTIONARY_FORMAT
    training_id: str
    model: ModelIdentity
    geometry: AttentionGeometry
    corpus: CorpusIdentity
    training: TrainingConfig
    sweep_seed: int
    hyperparameters: Hyperparameters
    metrics: dict[str, float | None]
    pair_mask: PairMaskConfig | None = None
    versions: dict[str, str]
    git_sha: str | None
    files: dict[str, str] = Field(default_factory=dict, description="SHA-256 by file name")

    @model_validator(mode="after")
    def _of_one_layer(self) -> Self:
        # else it would be tried on the inputs of a layer that it does not explain
        if self.model.layer != self.geometry.layer:
            raise ValueError(f"model.layer {self.model.layer} is not geometry.layer {self.geometry.layer}")
        return self

    @field_validator("files")
    @classmethod
    def _of_a_dictionary(cls, files: dict[str, str]) -> dict[str, str]:
        # else whoever wrote it could have any file of this machine read, or copied with the dictionary
        for name in files:
            if name not in TENSOR_FILES:
                raise ValueError(f"{name} is no file of a dictionary; known: {', '.join(TENSOR_FILES)}")
        return files


@dataclass(frozen=True)
class Dictionary:
    """A loaded dictionary: `transcoder(x)` gives q̂ and k̂, `pattern(x)` the pattern they make.

    `kept_pairs` are those that a mask left, None where there is no mask.
    """

    config: DictionaryConfig
    transcoder: QKTranscoder
    attention: AttentionLayer
    kept_pairs: KeptPairs | None = None

    def pattern(self, x: Float[Tensor, "batch context d_model"]) -> Float[Tensor, "batch n_heads context context"]:
        """p̂ of attention inputs `x`: from both sides' reconstructions, or from the kept pairs where they are masked."""
        if self.kept_pairs is None:
            return reconstructed_pattern(self.transcoder, self.attention, x)
        with ThreadPoolExecutor() as pool:
            return masked_pattern(self.transcoder, self.attention, self.kept_pairs.pairs, pool, x)


def save_dictionary(
    folder: Path,
    transcoder: QKTranscoder,
    attention: AttentionLayer,
    config: DictionaryConfig,
    kept_pairs: KeptPairs | None = None,
) -> str:
    """Writes a dictionary and returns its SHA-256 (hex).

    `config.files` is filled in here. A kill at any moment leaves either no `config.json` or a whole dictionary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {TRANSCODER_FILE: transcoder.state_dict(), ATTENTION_FILE: attention.to_tensors()}
    if kept_pairs is not None:
        tensors[PAIRS_FILE] = kept_pairs.to_tensors()
    files = {}
    for name, content in tensors.items():
        write_atomically(folder / name, save(content))
        files[name] = _sha256((folder / name).read_bytes())
    config = config.model_copy(update={"files": files})
    write_atomically(folder / CONFIG_FILE, _to_json(config))
    return dictionary_sha256(config)


def dictionary_sha256(config: DictionaryConfig) -> str:
    """The SHA-256 (hex) of the dictionary that `save_dictionary` wrote with this configuration."""
    return _sha256(_to_json(config))


def _to_json(config: DictionaryConfig) -> bytes:
    return config.model_dump_json(indent=1).encode()


def read_dictionary_config(folder: Path, sha256: str | None = None) -> tuple[DictionaryConfig, str]:
    """What a dictionary's folder says of it, and its SHA-256; nothing else in the folder is looked at.

    Raises InputError naming the file when it is missing, cannot be read, or has another hash than `sha256`.
    """
    content = _read(folder / CONFIG_FILE)
    found = _sha256(content)
    if sha256 is not None and found != sha256:
        raise InputError(f"{folder / CONFIG_FILE}: hash is {found[:12]}…, recorded was {sha256[:12]}…")
    return _parse_config(folder / CONFIG_FILE, content), found


def load_dictionary(folder: Path | str, sha256: str | None = None) -> Dictionary:
    """Loads a dictionary from a folder, with every hash and every shape checked.

    `sha256` is what `save_dictionary` returned (the ledger keeps it); with it nothing in the folder needs to be
    trusted. Raises InputError naming the file when something is missing, damaged, tampered with or does not fit.
    """
    folder = Path(folder)
    config, _ = read_dictionary_config(folder, sha256)
    tensors = {name: _checked_tensors(folder / name, config) for name in (TRANSCODER_FILE, ATTENTION_FILE)}
    attention = AttentionLayer.from_tensors(config.geometry, tensors[ATTENTION_FILE])
    with torch.device("meta"):
        # shapes alone: what a forged configuration asks for is compared before anything is allocated
        transcoder = empty_qk_transcoder(config.hyperparameters, attention)
    _fit(folder / TRANSCODER_FILE, transcoder, tensors[TRANSCODER_FILE])
    transcoder.requires_grad_(False)
    return Dictionary(config, transcoder, attention, _kept_pairs(folder / PAIRS_FILE, config, transcoder))


def _kept_pairs(path: Path, config: DictionaryConfig, transcoder: QKTranscoder) -> KeptPairs | None:
    if config.pair_mask is None:
        return None
    shape = (config.geometry.n_heads, transcoder.query.features, transcoder.key.features)
    tensors = _checked_tensors(path, config)
    try:
        return KeptPairs.from_tensors(tensors, shape)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def files_of(config: DictionaryConfig) -> tuple[str, ...]:
    """The names of the files that a dictionary is made of, that with all other's hashes last."""
    return (*config.files, CONFIG_FILE)


def find_loss(folder: Path, sha256: str) -> str | None:
    """What of the dictionary recorded with this hash is gone or another from `folder`, in words; None if nothing is.

    Tensors are looked for and not read: `load_dictionary` checks them.
    """
    for name in FILES:
        if not (folder / name).is_file():
            return f"{folder / name} is gone"
    content = (folder / CONFIG_FILE).read_bytes()
    if _sha256(content) != sha256:
        return f"{folder / CONFIG_FILE} is not the one that was recorded"
    # not parsed: a sweep of a thousand dictionaries looks at all of them whenever it starts
    if PAIRS_FILE.encode() in content and not (folder / PAIRS_FILE).is_file():
        return f"{folder / PAIRS_FILE} is gone"
    return None


def find_damage(folder: Path, sha256: str) -> str | None:
    """As `find_loss`, and what of the tensors' files has another hash than recorded. A few megabytes are read."""
    loss = find_loss(folder, sha256)
    if loss is not None:
        return loss
    # not more is asked of it than hashes: that it is the recorded one was just seen
    recorded = json.loads((folder / CONFIG_FILE).read_bytes())["files"]
    damaged = [name for name, wanted in recorded.items() if _sha256((folder / name).read_bytes()) != wanted]
    return f"{folder / damaged[0]} is damaged or was changed" if damaged else None


def _parse_config(path: Path, content: bytes) -> DictionaryConfig:
    try:
        found = json.loads(content).get("format")
    except (ValueError, RecursionError, AttributeError) as error:
        # ValueError: broken JSON, text that is not UTF-8, and whole numbers of more digits than Python reads
        raise InputError(f"{path}: not JSON as save_dictionary writes it ({error})") from error
    if found != DICTIONARY_FORMAT:
        raise InputError(f"{path}: dictionary format {found!r}; this version reads format {DICTIONARY_FORMAT}")
    try:
        return DictionaryConfig.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(": ".join(part for part in (str(path), where, first["msg"]) if part)) from error


def _checked_tensors(path: Path, config: DictionaryConfig) -> dict[str, Tensor]:
    content = _read(path)
    if _sha256(content) != config.files.get(path.name):
        raise InputError(f"{path}: hash differs from the one {CONFIG_FILE} records; the file is damaged or was changed")
    try:
        return load(content)
    except SafetensorError as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from error
    except KeyError as error:
        # the format has element types that torch has not
        raise InputError(f"{path}: has a tensor of type {error.args[0]}, which torch does not read") from error


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
