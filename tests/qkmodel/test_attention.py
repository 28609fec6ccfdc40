"""AttentionLayer against the models it is read from."""

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, GptOssConfig, LlamaConfig, MistralConfig

from qkmodel.attention import AttentionGeometry, AttentionLayer
from qkmodel.attention_extraction import check_pattern, extract_attention_layer
from qkmodel.configs import ModelConfig
from qkmodel.errors import InputError
from qkmodel.language_model import LanguageModel, load_language_model
from tests.qkmodel.random_models import CONFIGS, CONTEXT, WINDOW, random_hf_model, random_tokens, wrap

Parts = tuple[AttentionGeometry, dict[str, Tensor]]


@lru_cache
def language_model(family: str) -> LanguageModel:
    return wrap(random_hf_model(CONFIGS[family]))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_pattern_equals_the_models(family: str, layer: int) -> None:
    model, tokens = language_model(family), random_tokens()
    attention = extract_attention_layer(model, layer, tokens)
    x = model.attention_inputs(tokens, [layer])[layer]
    torch.testing.assert_close(
        attention.pattern(*attention.project(x)), model.attention_pattern(tokens, layer), atol=1e-6, rtol=0
    )


def geometry(**changes: object) -> Callable[[Parts], Parts]:
    """Changes the geometry and drops the tensors it no longer has."""

    def tamper(parts: Parts) -> Parts:
        changed = parts[0].model_copy(update=changes)
        return changed, {name: parts[1][name] for name in changed.tensor_shapes()}

    return tamper


def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Parts], Parts]:
    return lambda parts: (parts[0], parts[1] | {name: change(parts[1][name])})


def full_rotary(parts: Parts) -> Parts:
    d_head = parts[0].d_head
    inv_freq = 10_000.0 ** (-torch.arange(0, d_head, 2) / d_head)
    return parts[0].model_copy(update={"rotary_dim": d_head}), parts[1] | {"inv_freq": inv_freq}


def default_frequencies(inv_freq: Tensor) -> Tensor:
    return 10_000.0 ** (-torch.arange(len(inv_freq)) / len(inv_freq))


def swap_key_heads(w_k: Tensor) -> Tensor:
    return w_k.unflatten(0, (2, -1)).flip(0).flatten(0, 1)


@pytest.mark.parametrize(
    ("family", "layer", "tamper"),
    [
        pytest.param("gpt2", 2, geometry(scale=8**-0.5), id="gpt2 without scale by layer"),
        pytest.param("gpt2", 0, tensor("b_q", torch.zeros_like), id="gpt2 without query bias"),
        pytest.param("gpt2", 0, geometry(n_heads=2, n_kv_heads=2, d_head=16), id="gpt2 with wider heads"),
        pytest.param("pythia", 0, geometry(rotary_dim=0), id="pythia without rotary"),
        pytest.param("pythia", 0, full_rotary, id="pythia with full rotary"),
        pytest.param("pythia", 0, geometry(rotary_interleaved=True), id="pythia with adjacent pairs"),
        pytest.param("pythia", 0, tensor("b_k", torch.zeros_like), id="pythia without key bias"),
        pytest.param("llama3", 0, tensor("inv_freq", default_frequencies), id="llama3 with unscaled frequencies"),
        pytest.param("llama3", 0, tensor("w_k", swap_key_heads), id="llama3 with key heads swapped"),
        pytest.param("yarn", 0, geometry(rotary_scaling=1.0), id="yarn without its factor on cosine and sine"),
        pytest.param("qwen3", 0, geometry(qk_norm_eps=None), id="qwen3 without q/k norm"),
        pytest.param("qwen3", 0, tensor("q_norm", torch.ones_like), id="qwen3 without query norm weight"),
        pytest.param("qwen3", 0, tensor("k_norm", torch.ones_like), id="qwen3 without key norm weight"),
        pytest.param("gemma2", 0, geometry(soft_cap=None), id="gemma2 without soft-cap"),
        pytest.param("gemma2", 0, geometry(scale=8**-0.5), id="gemma2 with the usual scale"),
        pytest.param("gemma2", 0, geometry(window=None), id="gemma2 without window"),
        pytest.param("gemma2", 1, geometry(window=WINDOW), id="gemma2 with a window on a full layer"),
        pytest.param("gemma3", 0, tensor("q_norm", lambda weight: weight - 1), id="gemma3 without norm offset"),
        pytest.param(
            "gemma3", 1, tensor("inv_freq", default_frequencies), id="gemma3 with the other layers' frequencies"
        ),
        pytest.param("mistral", 1, geometry(window=None), id="mistral without window"),
        pytest.param("mistral", 1, geometry(window=WINDOW + 1), id="mistral with a window one too wide"),
        pytest.param("glm", 0, geometry(rotary_interleaved=False), id="glm with half-split pairs"),
    ],
)
def test_proof_refuses_a_layer_that_lacks_one_ingredient(
    family: str, layer: int, tamper: Callable[[Parts], Parts]
) -> None:
    model, tokens = language_model(family), random_tokens()
    extracted = extract_attention_layer(model, layer, tokens)
    tampered = AttentionLayer.from_tensors(*tamper((extracted.geometry, extracted.to_tensors())))
    x, pattern = model.attention_inputs(tokens, [layer])[layer], model.attention_pattern(tokens, layer)
    with pytest.raises(InputError, match=f"{model.architecture} layer {layer}: its attention is not supported"):
        check_pattern(tampered, x, pattern)


def test_proof_refuses_a_pattern_that_is_not_a_number() -> None:
    model, tokens = language_model("gpt2"), random_tokens()
    attention = extract_attention_layer(model, 0, tokens)
    x = model.attention_inputs(tokens, [0])[0]
    with pytest.raises(InputError, match="differs from the model's by nan"):
        check_pattern(attention, x * float("nan"), model.attention_pattern(tokens, 0))


_SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4), "BloomForCausalLM layer 1: .*Bloom"),
        (
            GptOssConfig(**_SMALL, num_key_value_heads=2, head_dim=8, num_local_experts=2, intermediate_size=16),
            "GptOssForCausalLM layer 1: attention sinks",
        ),
        (
            LlamaConfig(**_SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}),
            "LlamaForCausalLM layer 1: rotary scaling dynamic",
        ),
        (MistralConfig(**_SMALL, sliding_window=1), "MistralForCausalLM layer 1: a window of one token"),
    ],
    ids=["alibi", "sinks", "dynamic rotary", "window of one"],
)
def test_unsupported_attention_is_refused_by_name(config: object, message: str) -> None:
    hf_model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with pytest.raises(InputError, match=message):
        extract_attention_layer(wrap(hf_model), 1, random_tokens())


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_the_model_lacks_is_refused(layer: int) -> None:
    with pytest.raises(InputError, match="its layers are 0 to 2"):
        extract_attention_layer(language_model("gpt2"), layer, random_tokens())


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "glm"])
def test_round_trip_through_safetensors_and_json(family: str) -> None:
    model, tokens = language_model(family), random_tokens()
    attention = extract_attention_layer(model, 1, tokens)
    loaded = AttentionLayer.from_tensors(
        AttentionGeometry.model_validate_json(attention.geometry.model_dump_json()),
        load(save(attention.to_tensors())),
    )
    x = torch.randn(2, CONTEXT, 32)
    assert torch.equal(loaded.pattern(*loaded.project(x)), attention.pattern(*attention.project(x)))


def test_extracted_weights_are_frozen_copies() -> None:
    hf_model = random_hf_model(CONFIGS["mistral"])
    attention = extract_attention_layer(wrap(hf_model), 0, random_tokens())
    before = attention.w_q.clone()
    with torch.no_grad():
        hf_model.model.layers[0].self_attn.q.original_component.weight.zero_()
    assert torch.equal(attention.w_q, before)
    assert not list(attention.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_q": torch.zeros(32, 31)}, r"w_q has shape \[32, 31\], expected \[32, 32\]"),
        ({"b_k": torch.zeros(16, dtype=torch.int64)}, "b_k is torch.int64, expected floating point"),
        ({"w_v": torch.zeros(1)}, "unknown tensor w_v"),
        ({"inv_freq": None}, "tensor inv_freq is missing"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, Tensor | None], message: str) -> None:
    attention = extract_attention_layer(language_model("mistral"), 2, random_tokens())
    tensors = {name: value for name, value in (attention.to_tensors() | change).items() if value is not None}
    with pytest.raises(InputError, match=f"attention layer 2: .*{message}"):
        AttentionLayer.from_tensors(attention.geometry, tensors)


@pytest.mark.parametrize("family", ["pythia", "mistral", "glm"])
def test_rotated_products_depend_on_distance_only(family: str) -> None:
    """The property that defines a rotary embedding, and that its rotation is linear."""
    attention = extract_attention_layer(language_model(family), 1, random_tokens()).double()
    q, k = torch.randn(2, 1, 1, 2, 8, dtype=torch.float64)
    products = torch.einsum(
        "ihd,jhd->hij",
        attention.rotate(q.expand(-1, CONTEXT, -1, -1))[0],
        attention.rotate(k.expand(-1, CONTEXT, -1, -1))[0],
    )
    torch.testing.assert_close(products[:, 1:, 1:], products[:, :-1, :-1])
    assert products[0, 0].std() > 1e-3
    a, b = torch.randn(2, 1, CONTEXT, 2, 8, dtype=torch.float64)
    torch.testing.assert_close(attention.rotate(3 * a + b), 3 * attention.rotate(a) + attention.rotate(b))


def test_gradient_flows_to_queries_and_keys() -> None:
    attention = extract_attention_layer(language_model("gemma2"), 0, random_tokens()).double()
    q = torch.randn(1, 9, 4, 8, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 9, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attention.pattern, (q, k))


@pytest.mark.system
def test_smollm2_layers_are_proved() -> None:
    model = load_language_model(ModelConfig(name="smollm2-135m"))
    tokens = torch.randint(1000, 40_000, (2, 64), generator=torch.Generator().manual_seed(0))
    for layer in (0, 8, 29):
        attention = extract_attention_layer(model, layer, tokens)
        assert (attention.geometry.n_heads, attention.geometry.n_kv_heads, attention.geometry.d_head) == (9, 3, 64)
