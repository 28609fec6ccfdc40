"""What is refused of a prompt, and what a dictionary from someone else cannot do to who explains it."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from orchestrator.explanation import explain, read_prompt
from qkmodel.configs import ModelConfig
from qkmodel.dictionary import Dictionary, load_dictionary
from qkmodel.errors import InputError
from qkmodel.model_description import describe_model
from tests.orchestrator.dictionaries import make_sweep
from tests.qkmodel.random_models import random_hf_model, save_random_model


def test_a_dictionary_cannot_allow_a_models_code_to_run(tmp_path: Path) -> None:
    ledger = make_sweep(tmp_path)
    training = ledger.trainings()[0]
    model, ran = tmp_path / "model", tmp_path / "ran"
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 9}
    random_hf_model(LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained(model)
    (model / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nfrom transformers import LlamaConfig as Evil\n")
    described = json.loads((model / "config.json").read_text())
    described |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (model / "config.json").write_text(json.dumps(described))
    dictionary = load_dictionary(ledger.folder / training.dictionary)
    allowed = {"name": str(model), "trust_remote_code": True, "safetensors_only": False}
    config = dictionary.config.model.config.model_copy(update=allowed)
    identity = dictionary.config.model.model_copy(update={"config": config})
    forged = type(dictionary)(
        dictionary.config.model_copy(update={"model": identity}), dictionary.transcoder, dictionary.attention
    )
    with pytest.raises(InputError):
        explain(forged, 0, "hello", 1, 1)
    assert not ran.exists()


def test_bytes_that_are_no_text_are_refused() -> None:
    # as Python reads bytes of the command line that are not UTF-8
    prompt = b"caf\xe9".decode(errors="surrogateescape")
    with pytest.raises(InputError, match="--prompt: is not UTF-8 text"):
        read_prompt(prompt, None)


def test_a_layer_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    # with heads and weights that fit: nothing else would notice
    ledger = make_sweep(tmp_path, fronts={9: {"aaaa000000000001": (8.0, 0.5)}})
    dictionary = load_dictionary(ledger.folder / ledger.trainings()[0].dictionary)
    model = tmp_path / "model"
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    save_random_model(LlamaConfig(**sizes, num_attention_heads=4), model)
    named = ModelConfig(name=str(model))
    changed = {"config": named, "weights_sha256": describe_model(named).weights_sha256}
    identity = dictionary.config.model.model_copy(update=changed)
    config = dictionary.config.model_copy(update={"model": identity})
    with pytest.raises(InputError, match=r"is of layer 9; model .* has layers 0 to 1"):
        explain(Dictionary(config, dictionary.transcoder, dictionary.attention), 0, "hello", 1, 1)
