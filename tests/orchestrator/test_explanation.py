"""What a dictionary from someone else cannot do to who explains it."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from orchestrator.explanation import explain
from qkmodel.dictionary import load_dictionary
from qkmodel.errors import InputError
from tests.orchestrator.dictionaries import make_sweep
from tests.qkmodel.random_models import random_hf_model


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
