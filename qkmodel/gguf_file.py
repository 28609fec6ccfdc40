"""Llama-architecture GGUF files: their metadata, and their conversion to a folder that transformers loads.

transformers reads GGUF itself, but takes half a minute for a small model, mostly over the metadata's token
lists; a converted folder loads in a second.

File layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from qkmodel.errors import InputError
from qkmodel.files import PARTIAL_SUFFIX

_MAGIC, _VERSION = b"GGUF", 3
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32

_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies: row-major `shape`, ggml's number of its `quantisation`, absolute `offset` in bytes."""

    shape: tuple[int, ...]
    quantisation: int
    offset: int


@dataclass(frozen=True)
class GGUFHeader:
    """A GGUF file's metadata, by its own keys, and its tensors by name."""

    metadata: Mapping[str, object]
    tensors: Mapping[str, GGUFTensor]


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read everything but the weights.

    Raises:
        InputError: `path` is no GGUF file of version 3, or ends early.
    """
    with path.open("rb") as file:
        try:
            if file.read(4) != _MAGIC or _scalar(file, "I") != _VERSION:
                raise InputError(f"{path} is not a GGUF file of version {_VERSION}")
            n_tensors, n_keys = _scalar(file, "Q"), _scalar(file, "Q")
            metadata = {_string(file): _value(file, _scalar(file, "I")) for _ in range(n_keys)}
            tensors = dict(_tensor(file) for _ in range(n_tensors))
        except struct.error as error:
            raise InputError(f"{path} ends within its GGUF header") from error
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        start = math.ceil(file.tell() / alignment) * alignment
    placed = {
        name: GGUFTensor(tensor.shape, tensor.quantisation, tensor.offset + start) for name, tensor in tensors.items()
    }
    return GGUFHeader(metadata, placed)


def llama_config(path: Path, header: GGUFHeader) -> dict[str, object]:
    """`config.json` of the model that the header describes.

    Raises:
        InputError: the architecture is not llama, or a required key is missing.
    """
    metadata = header.metadata
    if metadata.get("general.architecture") != "llama":
        raise InputError(f"{path}: architecture {metadata.get('general.architecture')} is not supported, only llama")
    try:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": metadata["llama.embedding_length"],
            "intermediate_size": metadata["llama.feed_forward_length"],
            "num_hidden_layers": metadata["llama.block_count"],
            "num_attention_heads": metadata["llama.attention.head_count"],
            "num_key_value_heads": metadata["llama.attention.head_count_kv"],
            "head_dim": metadata["llama.rope.dimension_count"],
            "max_position_embeddings": metadata["llama.context_length"],
            "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"],
            "rope_parameters": {"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
            "tie_word_embeddings": "output.weight" not in header.tensors,
            "vocab_size": metadata["llama.vocab_size"],
            "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
            "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
            "dtype": "float32",
        }
    except KeyError as error:
        raise InputError(f"{path}: metadata key {error.args[0]} is missing") from error


def convert_llama_gguf(source: Path, folder: Path) -> None:
    """Write `folder` with float32 safetensors, config.json and tokenizer files of the GGUF file `source`.

    The folder appears whole or not at all, and several processes may convert at once.

    Raises:
        InputError: `source` is not a llama GGUF file whose tensors are all known.
    """
    # transformers takes seconds to import, and a converted folder is the rule
    from safetensors.numpy import save_file
    from transformers import AutoTokenizer

    header = read_gguf_header(source)
    config = llama_config(source, header)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=PARTIAL_SUFFIX, dir=folder.parent))
    try:
        save_file(_llama_weights(source, header, config), partial / "model.safetensors", metadata={"format": "pt"})
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True).save_pretrained(
            partial
        )
        for file in partial.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        try:
            partial.rename(folder)
        except OSError:
            # another process was first; its folder is whole, since it too came by a rename
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _llama_weights(source: Path, header: GGUFHeader, config: Mapping[str, object]) -> dict[str, np.ndarray]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    data = np.memmap(source, mode="r", dtype=np.uint8)
    weights = {}
    for name, tensor in header.tensors.items():
        block, _, part = name.removesuffix(".weight").rpartition(".")
        weight = _dequantise(source, name, data, tensor)
        if part in heads:
            weight = _to_half_split_rows(weight, heads[part])
        weights[_module(source, name, block, part) + ".weight"] = np.ascontiguousarray(weight)
    return weights


def _module(source: Path, name: str, block: str, part: str) -> str:
    """transformers' name for the module that holds tensor `name`, `blk.<layer>.<part>.weight` or `<part>.weight`."""
    if not block and part in _OUTER_MODULES:
        return _OUTER_MODULES[part]
    if block.startswith("blk.") and part in _MODULES and name.endswith(".weight"):
        return f"model.layers.{block.removeprefix('blk.')}.{_MODULES[part]}"
    raise InputError(f"{source}: tensor {name} is not part of a llama model this converter knows")


def _to_half_split_rows(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Row order of transformers' rotary embedding, which pairs i with i + d/2; llama.cpp pairs 2i with 2i + 1."""
    pairs = weight.shape[0] // n_heads // 2
    return weight.reshape(n_heads, pairs, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _dequantise(source: Path, name: str, data: np.ndarray, tensor: GGUFTensor) -> np.ndarray:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(tensor.quantisation)
    block_elements, block_bytes = GGML_QUANT_SIZES[kind]
    size = math.prod(tensor.shape) // block_elements * block_bytes
    stored = np.asarray(data[tensor.offset : tensor.offset + size])
    if len(stored) < size:
        raise InputError(f"{source} ends within tensor {name}")
    return dequantize(stored.reshape(*tensor.shape[:-1], -1), kind).astype(np.float32).reshape(tensor.shape)


def _scalar(file: BinaryIO, kind: str) -> int | float | bool:
    return struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))[0]


def _string(file: BinaryIO) -> str:
    return file.read(_scalar(file, "Q")).decode()


def _value(file: BinaryIO, kind: int) -> object:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        element, length = _scalar(file, "I"), _scalar(file, "Q")
        return [_value(file, element) for _ in range(length)]
    return _scalar(file, _SCALARS[kind])


def _tensor(file: BinaryIO) -> tuple[str, GGUFTensor]:
    """One tensor's entry; its offset is still relative to the start of the data."""
    name, dimensions = _string(file), _scalar(file, "I")
    # ggml lists the fastest-varying dimension first
    shape = tuple(reversed([_scalar(file, "Q") for _ in range(dimensions)]))
    return name, GGUFTensor(shape, _scalar(file, "I"), _scalar(file, "Q"))
