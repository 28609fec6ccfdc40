"""Conversion of a GGUF file that the gguf package wrote."""

import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qkmodel.errors import InputError
from qkmodel.gguf_file import convert_llama_gguf, read_gguf_header
from tests.qkmodel.random_models import random_hf_model, random_tokens

_CONFIG = LlamaConfig(
    vocab_size=258,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=0.01,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    tie_word_embeddings=False,
)
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _adjacent_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order, as its convert_hf_to_gguf.py permutes query and key rows."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _write(path: Path, weights: dict[str, np.ndarray], *, architecture: str = "llama", quantise: bool = False) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(0.01)
    writer.add_vocab_size(258)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*bytes_to_unicode().values(), "ab", "<end>"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(257)
    for name, weight in weights.items():
        if quantise and weight.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def model() -> torch.nn.Module:
    return random_hf_model(_CONFIG)


@pytest.fixture
def weights(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The model's weights under llama.cpp's names and in its row order."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        module = name.removesuffix(".weight")
        if "q_proj" in name or "k_proj" in name:
            weight = _adjacent_pairs(weight, 4 if "q_proj" in name else 2)
        if module.startswith("model.layers."):
            _, _, layer, part = module.split(".", 3)
            renamed[f"blk.{layer}.{_NAMES[part]}.weight"] = weight
        else:
            renamed[f"{_NAMES[module]}.weight"] = weight
    return renamed


def test_a_converted_model_computes_the_same(model: torch.nn.Module, weights: dict, tmp_path: Path) -> None:
    _write(tmp_path / "model.gguf", weights)
    convert_llama_gguf(tmp_path / "model.gguf", tmp_path / "converted")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", attn_implementation="eager").eval()
    assert converted.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(converted(random_tokens()).logits, model(random_tokens()).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")
    assert tokenizer("x").input_ids == [list(bytes_to_unicode().values()).index("x")]
    assert tokenizer.bos_token == "<end>"


def test_quantised_weights_are_restored(weights: dict, tmp_path: Path) -> None:
    _write(tmp_path / "model.gguf", weights, quantise=True)
    convert_llama_gguf(tmp_path / "model.gguf", tmp_path / "converted")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").state_dict()
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(weights["blk.1.ffn_up.weight"], kind), kind)
    np.testing.assert_array_equal(converted["model.layers.1.mlp.up_proj.weight"].numpy(), expected)


def test_two_conversions_at_once_leave_one_whole_folder(weights: dict, tmp_path: Path) -> None:
    _write(tmp_path / "model.gguf", weights)
    with ThreadPoolExecutor(3) as pool:
        for done in [
            pool.submit(convert_llama_gguf, tmp_path / "model.gguf", tmp_path / "out" / "x") for _ in range(3)
        ]:
            done.result()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "x")


@pytest.mark.parametrize("length", [0, 3, 20, 500])
def test_a_truncated_header_is_refused(length: int, weights: dict, tmp_path: Path) -> None:
    _write(tmp_path / "model.gguf", weights)
    (tmp_path / "short.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:length])
    with pytest.raises(InputError, match=r"short\.gguf"):
        read_gguf_header(tmp_path / "short.gguf")


def test_truncated_weights_are_refused_and_leave_nothing(weights: dict, tmp_path: Path) -> None:
    _write(tmp_path / "model.gguf", weights)
    (tmp_path / "short.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:-2000])
    with pytest.raises(InputError, match=r"short\.gguf ends within tensor"):
        convert_llama_gguf(tmp_path / "short.gguf", tmp_path / "out" / "x")
    assert not list((tmp_path / "out").iterdir())


def test_what_is_not_a_llama_is_refused(weights: dict, tmp_path: Path) -> None:
    _write(tmp_path / "falcon.gguf", weights, architecture="falcon")
    with pytest.raises(InputError, match="architecture falcon is not supported"):
        convert_llama_gguf(tmp_path / "falcon.gguf", tmp_path / "out")
    _write(tmp_path / "extra.gguf", weights | {"rope_freqs.weight": np.ones(4, np.float32)})
    with pytest.raises(InputError, match=r"tensor rope_freqs\.weight is not part"):
        convert_llama_gguf(tmp_path / "extra.gguf", tmp_path / "out")
    (tmp_path / "old.gguf").write_bytes(b"GGUF" + struct.pack("<I", 2))
    with pytest.raises(InputError, match="not a GGUF file of version 3"):
        read_gguf_header(tmp_path / "old.gguf")
    assert not (tmp_path / "out").exists()
