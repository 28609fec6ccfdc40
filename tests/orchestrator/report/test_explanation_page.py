"""The page of `orchestrate explain`: contexts from a real cache, every text escaped."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from orchestrator.report.explanation_page import write_explanation
from orchestrator.storage_check import CACHE_FOLDER
from qkmodel.activations import SHARD_SEQUENCES, read_manifest
from qkmodel.configs import CorpusConfig, ModelConfig
from qkmodel.dictionary import CorpusIdentity, Dictionary, DictionaryConfig, ModelIdentity
from qkmodel.errors import InputError
from qkmodel.files import require_place
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.pair_mask.explanation import HeadExplanation, explain_head
from qkmodel.pair_mask.kept_pairs import KeptPairs
from qkmodel.pair_mask.pair_set import PairSet
from qkmodel.transcoder import initialise_qk_transcoder
from tests.qkmodel.world import CONTEXT, LAYER, make_world

MARKUP = "</span><script>alert(1)</script>\n"
SETTINGS = Hyperparameters(dictionary_size=16, activation="topk", k=4, learning_rate=1e-3)


@pytest.fixture(scope="module")
def explained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Dictionary, HeadExplanation]:
    """Where activations are kept, a dictionary of random weights, and what it says of a validation sequence."""
    storage = tmp_path_factory.mktemp("storage")
    world = make_world(storage / "activations")
    means = (world.reference.mean_input, world.reference.mean_query, world.reference.mean_key)
    transcoder = initialise_qk_transcoder(SETTINGS, world.layer, *means, world.reference.input_rms)
    transcoder.requires_grad_(False)
    config = DictionaryConfig(
        training_id="a1" * 8,
        model=ModelIdentity(config=ModelConfig(name="random"), weights_sha256="w", layer=LAYER, hook="h"),
        geometry=world.layer.geometry,
        corpus=CorpusIdentity(
            config=CorpusConfig(name="c", context=CONTEXT, validation_documents=0.5), bos="b", sha256="c"
        ),
        training=world.training,
        sweep_seed=0,
        hyperparameters=SETTINGS,
        metrics={},
        versions={},
        git_sha=None,
    )
    x = world.cache.read(LAYER, "validation", [0])[0]
    return storage, Dictionary(config, transcoder, world.layer), explain_head(transcoder, world.layer, x, head=1)


def texts(tokens: Sequence[int]) -> list[str]:
    return [MARKUP for _ in tokens]


def test_contexts_are_there_and_no_text_is_markup(explained, tmp_path: Path) -> None:
    storage, dictionary, found = explained
    page = tmp_path / "page.html"
    assert write_explanation(page, dictionary, found, texts(range(CONTEXT)), texts, str(storage)) == []
    content = page.read_text()
    assert "<script" not in content and "&lt;script&gt;alert(1)&lt;/script&gt;" in content
    assert "↵" in content and "None: nothing was read" not in content
    assert content.count('class="key-place"') + content.count('class="query-place key-place"') > 10
    for look in found.looks:
        for one in look.pairs[:1]:
            assert f"{one.query_feature}×{one.key_feature}: {one.contribution:+.2f}" in content


def test_without_activations_the_page_says_what_is_left_out(explained, tmp_path: Path) -> None:
    _, dictionary, found = explained
    page = tmp_path / "page.html"
    (line,) = write_explanation(page, dictionary, found, texts(range(CONTEXT)), texts, str(tmp_path))
    assert line.startswith("where pairs meet in the corpus is left out") and "Left out" in page.read_text()


def test_a_cache_of_too_few_sequences_is_passed_over(explained, tmp_path: Path) -> None:
    """As a sweep leaves one whose activations have another element type."""
    storage, dictionary, found = explained
    (whole,) = (storage / CACHE_FOLDER).glob("*/manifest.json")
    manifest = read_manifest(whole.parent)
    # read before the other: caches are gone through by name
    fewer = tmp_path / CACHE_FOLDER / "0"
    shutil.copytree(whole.parent, fewer)
    more = dictionary.config.training.model_copy(update={"validation_sequences": SHARD_SEQUENCES + 1})
    larger = replace(dictionary, config=dictionary.config.model_copy(update={"training": more}))
    page = tmp_path / "page.html"
    (line,) = write_explanation(page, larger, found, texts(range(CONTEXT)), texts, str(tmp_path))
    assert "has no activations of it; start the sweep again" in line
    shards = {
        path.replace("-00000", "-00001"): shard for path, shard in manifest.shards.items() if "validation" in path
    }
    shutil.copytree(fewer, fewer.parent / "1")
    for path in shards:
        shutil.copy(fewer / path.replace("-00001", "-00000"), fewer.parent / "1" / path)
    grown = manifest.model_copy(update={"shards": manifest.shards | shards})
    (fewer.parent / "1" / "manifest.json").write_text(grown.model_dump_json())
    assert write_explanation(page, larger, found, texts(range(CONTEXT)), texts, str(tmp_path)) == []


def test_a_masks_page_counts_the_pairs_itself(explained, tmp_path: Path) -> None:
    storage, dictionary, found = explained
    assert "are kept" not in written(explained, tmp_path)
    numbers = np.arange(1234)
    pairs = PairSet.from_numbers(numbers, (dictionary.config.geometry.n_heads, 16, 16))
    masked = replace(dictionary, kept_pairs=KeptPairs(pairs, numbers.astype(np.float32), numbers, numbers))
    content = written((storage, masked, found), tmp_path)
    assert "of whose pairs 1,234 are kept" in content and "of every kept pair" in content
    assert "<th>not kept</th>" in content


def written(explained, folder: Path) -> str:
    storage, dictionary, found = explained
    write_explanation(folder / "page.html", dictionary, found, texts(range(CONTEXT)), texts, str(storage))
    return (folder / "page.html").read_text()


def test_a_place_without_room_for_a_page_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "gone" / "page.html"):
        with pytest.raises(InputError, match="--output"):
            require_place("--output", place)
