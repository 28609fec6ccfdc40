"""A saved dictionary comes back exactly, and one that was damaged, changed or does not fit does not come back."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from qkmodel.configs import CorpusConfig, ModelConfig
from qkmodel.dictionary import (
    ATTENTION_FILE,
    CONFIG_FILE,
    TRANSCODER_FILE,
    CorpusIdentity,
    DictionaryConfig,
    ModelIdentity,
    load_dictionary,
    save_dictionary,
)
from qkmodel.errors import InputError
from qkmodel.evaluation import evaluate
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.transcoder import initialise_qk_transcoder
from tests.qkmodel.world import LAYER, SmallWorld

MODEL = ModelConfig(name="owner/model", revision="abc", safetensors_only=False)
TOPK = Hyperparameters(dictionary_size=24, activation="topk", k=3, learning_rate=1e-2)


@pytest.fixture
def saved(world: SmallWorld, tmp_path: Path) -> tuple[Path, str]:
    reference = world.reference
    transcoder = initialise_qk_transcoder(
        TOPK, world.layer, reference.mean_input, reference.mean_query, reference.mean_key, reference.input_rms
    )
    config = DictionaryConfig(
        training_id="t",
        model=ModelIdentity(config=MODEL, weights_sha256="w", layer=LAYER, hook="blocks.1.attn.hook_in"),
        geometry=world.layer.geometry,
        corpus=CorpusIdentity(config=CorpusConfig(name="c"), bos=None, sha256="c"),
        training=world.training,
        sweep_seed=0,
        hyperparameters=TOPK,
        metrics=evaluate([transcoder], world.layer, world.cache, reference, 19)[0] | {"ce_recovered": None},
        versions={"torch": torch.__version__},
        git_sha=None,
    )
    folder = tmp_path / "dictionary"
    return folder, save_dictionary(folder, transcoder, world.layer, config)


def rewrite_tensors(folder: Path, name: str, change: dict[str, torch.Tensor | None]) -> None:
    """Tampers with tensors and fits the recorded hash to them, as someone with bad intent would."""
    tensors = load_file(folder / name) | change
    content = save({key: value for key, value in tensors.items() if value is not None})
    (folder / name).write_bytes(content)
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["files"][name] = hashlib.sha256(content).hexdigest()
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def test_metrics_survive_to_the_last_digit(world: SmallWorld, saved: tuple[Path, str]) -> None:
    dictionary = load_dictionary(*saved)
    (again,) = evaluate([dictionary.transcoder], dictionary.attention, world.cache, world.reference, 19)
    assert again | {"ce_recovered": None} == dictionary.config.metrics
    assert dictionary.config.model.config == MODEL
    assert not any(parameter.requires_grad for parameter in dictionary.transcoder.parameters())


def test_saving_again_gives_the_same_hash(world: SmallWorld, saved: tuple[Path, str], tmp_path: Path) -> None:
    dictionary = load_dictionary(*saved)
    again = save_dictionary(tmp_path / "again", dictionary.transcoder, dictionary.attention, dictionary.config)
    assert again == saved[1]


@pytest.mark.parametrize("name", [TRANSCODER_FILE, ATTENTION_FILE])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_file_is_named(saved: tuple[Path, str], name: str, damage: str) -> None:
    path = saved[0] / name
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "flipped":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=name) as refused:
        load_dictionary(saved[0])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query.W_enc": torch.zeros(24, 5)}, r"query\.W_enc.*\(24, 5\).*\(24, 32\)"),
        ({"query.W_enc": torch.zeros(23, 32)}, r"query\.W_enc"),
        ({"key.b_out": None}, r"key\.b_out is missing"),
        ({"extra": torch.zeros(1)}, "extra is not part of a transcoder"),
        ({"key.b_enc": torch.zeros(24, dtype=torch.float64)}, r"key\.b_enc is torch\.float64"),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved: tuple[Path, str], change: dict, words: str) -> None:
    rewrite_tensors(saved[0], TRANSCODER_FILE, change)
    with pytest.raises(InputError, match=words):
        load_dictionary(saved[0])


def test_a_type_that_torch_does_not_have_is_named(saved: tuple[Path, str]) -> None:
    head = json.dumps({"query.W_enc": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    content = len(head).to_bytes(8, "little") + head + bytes(2)
    (saved[0] / TRANSCODER_FILE).write_bytes(content)
    config = json.loads((saved[0] / CONFIG_FILE).read_text())
    config["files"][TRANSCODER_FILE] = hashlib.sha256(content).hexdigest()
    (saved[0] / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"transcoder\.safetensors: has a tensor of type F4"):
        load_dictionary(saved[0])


def test_a_consistent_forgery_fails_against_the_ledgers_hash(saved: tuple[Path, str]) -> None:
    folder, sha256 = saved
    rewrite_tensors(folder, TRANSCODER_FILE, {"query.b_enc": torch.ones(24)})
    load_dictionary(folder)
    with pytest.raises(InputError, match=r"config\.json: hash is"):
        load_dictionary(folder, sha256)


def test_a_forged_size_is_compared_before_it_is_allocated(saved: tuple[Path, str]) -> None:
    config = json.loads((saved[0] / CONFIG_FILE).read_text())
    config["hyperparameters"]["dictionary_size"] = 2**20
    (saved[0] / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"needs float32 \(1048576"):
        load_dictionary(saved[0])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"[1]", "not JSON"),
        # deeper than Python's parser goes, and a number of more digits than it reads
        (b"[" * 100_000, "not JSON"),
        (b'{"format": ' + b"1" * 5_000 + b"}", "not JSON"),
        # a byte order mark, which Python's parser takes and pydantic's does not
        (b'\xef\xbb\xbf{"format": 2}', r"config\.json: Invalid JSON"),
        (b'{"format": 1}', "format 1; this version reads format 2"),
        (b'{"format": 2}', "training_id"),
    ],
)
def test_a_config_that_is_none_is_refused(saved: tuple[Path, str], content: bytes, words: str) -> None:
    (saved[0] / CONFIG_FILE).write_bytes(content)
    with pytest.raises(InputError, match=words):
        load_dictionary(saved[0])


def test_a_config_of_two_layers_is_refused(saved: tuple[Path, str]) -> None:
    config = json.loads((saved[0] / CONFIG_FILE).read_text())
    config["model"]["layer"] += 1
    (saved[0] / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"model\.layer {LAYER + 1} is not geometry\.layer {LAYER}"):
        load_dictionary(saved[0])


def test_a_folder_without_a_dictionary_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        load_dictionary(tmp_path / "nothing")
