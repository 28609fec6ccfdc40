"""What is refused of a prompt, and what a dictionary from someone else cannot do to who explains it."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from orchestrator.explanation import explain, open_dictionary, read_prompt
from orchestrator.ledger_file import LEDGER_FILE
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


@pytest.mark.parametrize("blank", ["", " \n\t"])
def test_a_text_of_blanks_is_refused_by_what_it_was_given_with(blank: str, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(blank)
    with pytest.raises(InputError, match=r"--text: .*text\.txt: is empty"):
        read_prompt(None, file)
    with pytest.raises(InputError, match="--prompt: is empty"):
        read_prompt(blank, None)


def small_dictionary(folder: Path, layer: int = 8, bos: str | None = "Text", **sizes: int) -> Dictionary:
    """One of a model of random weights with nine layers, whose tokens are words: Text, of, twelve."""
    ledger = make_sweep(folder, fronts={layer: {"aaaa000000000001": (8.0, 0.5)}})
    dictionary = load_dictionary(ledger.folder / ledger.trainings()[0].dictionary)
    named = ModelConfig(name=str(folder / "model"))
    usual = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 9}
    save_random_model(LlamaConfig(**usual | sizes, num_attention_heads=4), folder / "model")
    changed = {"config": named, "weights_sha256": describe_model(named).weights_sha256}
    config = dictionary.config.model_copy(
        update={
            "model": dictionary.config.model.model_copy(update=changed),
            "corpus": dictionary.config.corpus.model_copy(update={"bos": bos}),
        }
    )
    return Dictionary(config, dictionary.transcoder, dictionary.attention)


@pytest.mark.parametrize(("bos", "expected"), [("Text", ["Text", "of", "twelve."]), (None, ["of", "twelve."])])
def test_the_text_stands_behind_the_opening_token(bos: str | None, expected: list[str], tmp_path: Path) -> None:
    # written before the text, Text would be no word of this tokeniser
    found, tokens, _ = explain(small_dictionary(tmp_path, bos=bos), 3, "of twelve.", 1, 1)
    assert tokens == expected
    assert [look.query for look in found.looks] == list(range(len(expected)))


def test_what_does_not_go_with_dictionary_or_model_is_refused(tmp_path: Path) -> None:
    dictionary = small_dictionary(tmp_path / "few", max_position_embeddings=4)
    with pytest.raises(InputError, match="--head: 4 is not there; layer 8 has heads 0 to 3"):
        explain(dictionary, 4, "of", 1, 1)
    with pytest.raises(InputError, match="has 5 tokens with the opening one; the model takes 4"):
        explain(dictionary, 0, "of of of of", 1, 1)
    assert explain(dictionary, 0, "of of of", 1, 1)[0].p.shape == (4, 4)
    with pytest.raises(InputError, match="is no token of this tokeniser"):
        explain(small_dictionary(tmp_path / "bos", bos="none of it"), 0, "of", 1, 1)
    # with heads and weights that fit: nothing else would notice
    with pytest.raises(InputError, match=r"is of layer 9; model .* has layers 0 to 1"):
        explain(small_dictionary(tmp_path / "deep", layer=9, num_hidden_layers=2), 0, "of", 1, 1)
    with pytest.raises(InputError, match=r"reads 24 numbers a token; layers of model .* receive 40"):
        explain(small_dictionary(tmp_path / "wide", hidden_size=40), 0, "of", 1, 1)


def test_a_sweep_in_place_of_a_dictionary_is_told_where_its_dictionaries_are(tmp_path: Path) -> None:
    (tmp_path / LEDGER_FILE).touch()
    with pytest.raises(InputError, match="is a sweep's folder; give one of those in its dictionaries/"):
        open_dictionary(str(tmp_path), None)
