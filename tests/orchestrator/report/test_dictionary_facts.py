"""Which cache is read, and how much of it is shown."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.ledger import Ledger
from orchestrator.ledger_records import Study
from orchestrator.report.corpus_cache import cache_of_study
from orchestrator.report.dictionary_facts import MOST_TOKENS, SENTENCES, tokens_that_fit
from qkmodel.activations import FORMAT_VERSION, CacheKey, Manifest, Shard
from qkmodel.errors import InputError

KEY = CacheKey(
    weights_sha256="w",
    tokenizer_sha256="t",
    corpus_sha256="c",
    bos=None,
    context=12,
    seed=3,
    validation_documents=0.1,
    dtype="bfloat16",
    products="bfloat16",
    d_model=8,
)
IDENTITY = {
    "weights_sha256": "w",
    "tokenizer_sha256": "t",
    "corpus": {"sha256": "c", "bos": None, "context": 12, "validation_documents": 0.1},
    "dtype": "bfloat16",
    "seed": 3,
}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    ledger = Ledger(tmp_path / "small" / "ledger.sqlite")
    return ledger.open_study("study", "transcoder", 2, IDENTITY, model="m", corpus="c")


def write_manifest(storage: Path, layer: int, **changes: Any) -> str:
    key = KEY.model_copy(update=changes)
    shards = {f"L{layer:02d}/validation-00000.safetensors": Shard(sequences=1, sha256="s")}
    folder = storage / "activations" / key.folder_name
    folder.mkdir(parents=True)
    manifest = Manifest.empty(key).model_copy(update={"shards": shards})
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return key.folder_name


@pytest.mark.parametrize("products", ["bfloat16", "float32"])
def test_the_cache_of_the_study_is_found_among_others(tmp_path: Path, study: Study, products: str) -> None:
    for changes in ({"bos": "b"}, {"seed": 4}, {"context": 13}, {"corpus_sha256": "d"}, {"dtype": "float32"}):
        write_manifest(tmp_path, 2, **changes)
    (tmp_path / "activations" / "0000").mkdir()
    unknown = tmp_path / "activations" / "0001"
    unknown.mkdir()
    (unknown / "manifest.json").write_text(json.dumps({"format_version": FORMAT_VERSION + 1}))
    with pytest.raises(InputError, match="has no activations of it"):
        cache_of_study(tmp_path, study)
    own = write_manifest(tmp_path, 2, products=products)
    assert cache_of_study(tmp_path, study).folder.name == own


def test_a_cache_of_other_layers_is_none(tmp_path: Path, study: Study) -> None:
    write_manifest(tmp_path, 1)
    with pytest.raises(InputError, match="has no activations of it"):
        cache_of_study(tmp_path, study)


@given(st.integers(1, 128), st.integers(1, 200))
def test_patterns_of_all_studies_take_two_megabytes_at_most(heads: int, studies: int) -> None:
    tokens = tokens_that_fit(heads, studies)
    assert 2 <= tokens <= MOST_TOKENS

    def taken(count: int) -> int:
        # base64 of two bytes an entry, two patterns a sentence
        return studies * SENTENCES * 2 * (-(-2 * heads * count * (count + 1) // 2 * 4) // 3)

    assert tokens == 2 or taken(tokens) <= 2_000_000
    assert tokens == MOST_TOKENS or taken(tokens + 1) > 1_990_000
