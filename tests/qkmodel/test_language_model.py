"""LanguageModel: what it reads from a model, and loading from a folder."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qkmodel.configs import ModelConfig
from qkmodel.errors import InputError
from qkmodel.language_model import LanguageModel, load_language_model
from qkmodel.model_description import model_folder
from tests.qkmodel.random_models import CONFIGS, CONTEXT, VOCABULARY, random_hf_model, random_tokens, wrap


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "system" not in request.keywords:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def gpt2() -> LanguageModel:
    return wrap(random_hf_model(CONFIGS["gpt2"]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "Tiny GPT-2"
    random_hf_model(CONFIGS["gpt2"]).save_pretrained(folder)
    words = {f"w{number}": number for number in range(VOCABULARY)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0"))).save_pretrained(folder)
    return folder


def test_attention_inputs_are_what_the_projections_receive() -> None:
    """Compared with the plain transformers model, before transformer_lens wraps it."""
    tokens = random_tokens()
    hf_model = random_hf_model(CONFIGS["gpt2"])
    received = {}
    for layer in (0, 2):
        hf_model.transformer.h[layer].attn.c_attn.register_forward_pre_hook(
            lambda module, arguments, layer=layer: received.update({layer: arguments[0]})
        )
    with torch.no_grad():
        hf_model(tokens)
    read = wrap(random_hf_model(CONFIGS["gpt2"])).attention_inputs(tokens, [2, 0])
    assert read.keys() == {0, 2}
    for layer, x in read.items():
        torch.testing.assert_close(x, received[layer])


@pytest.mark.parametrize("family", CONFIGS)
def test_attention_inputs_are_the_normed_residual_stream(family: str) -> None:
    model, tokens = wrap(random_hf_model(CONFIGS[family])), random_tokens()
    _, cache = model.bridge.run_with_cache(tokens)
    for layer, x in model.attention_inputs(tokens, [1, 2]).items():
        assert torch.equal(x, cache[f"blocks.{layer}.ln1.hook_out"])


def test_forward_pass_stops_at_the_deepest_layer_asked_for(gpt2: LanguageModel) -> None:
    reached = []
    handles = [
        block.mlp.original_component.register_forward_hook(lambda *_, layer=layer: reached.append(layer))
        for layer, block in enumerate(gpt2.bridge.blocks)
    ]
    gpt2.attention_inputs(random_tokens(), [0, 1])
    for handle in handles:
        handle.remove()
    assert reached == [0]


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_cross_entropy_equals_transformers(family: str) -> None:
    tokens = random_tokens()
    with torch.no_grad():
        expected = random_hf_model(CONFIGS[family])(tokens, labels=tokens).loss.item()
    total, count = wrap(random_hf_model(CONFIGS[family])).cross_entropy(tokens)
    assert count == tokens.shape[0] * (CONTEXT - 1)
    assert total / count == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_patching_a_pattern(family: str) -> None:
    """The model's own pattern changes nothing; a uniform one does, and leaves nothing behind."""
    model, tokens = wrap(random_hf_model(CONFIGS[family])), random_tokens()
    clean, count = model.cross_entropy(tokens)
    own = model.attention_pattern(tokens, 1)
    assert model.cross_entropy(tokens, 1, own)[0] / count == pytest.approx(clean / count, abs=1e-6)
    uniform = torch.ones_like(own).tril()
    uniform /= uniform.sum(-1, keepdim=True)
    assert abs(model.cross_entropy(tokens, 1, uniform)[0] - clean) / count > 1e-3
    assert model.cross_entropy(tokens)[0] == clean


def test_a_folder_loads_as_the_model_it_was_saved_from(folder: Path, gpt2: LanguageModel) -> None:
    model = load_language_model(ModelConfig(name=str(folder)))
    tokens = random_tokens()
    assert model.cross_entropy(tokens) == gpt2.cross_entropy(tokens)
    assert model.tokenizer("w3", add_special_tokens=False).input_ids == [3]
    assert model.description.slug == "tiny-gpt-2"
    assert next(model.bridge.parameters()).dtype == torch.float32


def test_weights_that_lack_a_tensor_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.ln_1.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks the weights transformer\.h\.1\.ln_1\.weight"):
        load_language_model(ModelConfig(name=str(folder)))


def test_damaged_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_language_model(ModelConfig(name=str(folder)))


def test_code_in_a_folder_runs_only_on_request(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('"model_type": "gpt2"', '"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}')
    )
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match=r"config\.json cannot be used .*model\.trust_remote_code"):
        load_language_model(ModelConfig(name=str(folder)))
    assert not (folder / "ran").exists()


@pytest.mark.system
def test_the_converted_smollm2_equals_transformers_own_gguf_loading() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qkmodel.model_description import BUNDLED_MODELS, _bundled_file

    config = ModelConfig(name="smollm2-135m")
    source = _bundled_file(config.name)
    assert source.name == BUNDLED_MODELS[config.name].file
    expected = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    converted = load_file(model_folder(config) / "model.safetensors")
    for name, weight in expected.state_dict().items():
        assert torch.equal(weight, converted.get(name, converted["model.embed_tokens.weight"])), name
    model = load_language_model(config)
    text = "Fellow citizens,\n\nin 1984 the budget's deficit — $12.5 billion — grew. <|im_start|>"
    expected_tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    assert model.tokenizer(text).input_ids == expected_tokenizer(text).input_ids
    assert model.tokenizer.decode(model.tokenizer(text).input_ids) == text
    tokens = torch.randint(1000, 40_000, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = expected(tokens, labels=tokens).loss.item()
    total, count = model.cross_entropy(tokens)
    assert total / count == pytest.approx(loss, abs=1e-4)


def test_a_shorter_last_batch_does_not_disturb_the_others() -> None:
    """transformer_lens notes a batch's size on the model for learned positions, which threads share."""
    model = wrap(random_hf_model(CONFIGS["gpt2"]))
    batches = [torch.randint(VOCABULARY, (5 if number % 8 == 7 else 8, 9)) for number in range(64)]
    found = list(model.attention_inputs_of_batches(batches, [1], torch.float32, threads=4))
    assert [len(one[1]) for one in found] == [len(batch) for batch in batches]


def test_batches_are_asked_for_as_they_are_needed() -> None:
    """A cache's batches are many times what memory holds."""
    model, asked = wrap(random_hf_model(CONFIGS["llama3"])), []
    alone = [model.attention_inputs(torch.full((2, 9), number), [1])[1] for number in range(40)]
    batches = (asked.append(number) or torch.full((2, 9), number) for number in range(40))
    for number, found in enumerate(model.attention_inputs_of_batches(batches, [1], torch.float32, threads=2)):
        assert len(asked) <= number + 4
        assert torch.equal(found[1], alone[number])
    assert len(asked) == 40


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_batches_on_threads_are_the_batches_one_by_one(products: torch.dtype) -> None:
    model, threads = wrap(random_hf_model(CONFIGS["llama3"])), torch.get_num_threads()
    batches = list(torch.randint(VOCABULARY, (12, 2, 9), generator=torch.Generator().manual_seed(0)))
    torch.set_num_threads(1)
    try:
        together = list(model.attention_inputs_of_batches(batches, [0, 2], products, threads=4))
        alone = [next(model.attention_inputs_of_batches([batch], [0, 2], products)) for batch in batches]
    finally:
        torch.set_num_threads(threads)
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.keys() == theirs.keys() == {0, 2}
        assert all(torch.equal(ours[layer], theirs[layer]) for layer in ours)
    exact = model.attention_inputs(batches[0], [2])[2]
    error = (together[0][2] - exact).norm() / exact.norm()
    assert error == 0 if products == torch.float32 else 0 < error < 0.02
