import json
import multiprocessing
import os
import signal
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qkmodel.activation_build import build_activation_cache
from qkmodel.activation_request import CacheRequest, missing_work
from qkmodel.activations import (
    MANIFEST,
    SHARD_SEQUENCES,
    TENSOR_NAME,
    TOKENS,
    ActivationCache,
    CacheKey,
    Manifest,
    map_shard,
    read_manifest,
)
from qkmodel.corpus import TokenisedCorpus
from qkmodel.errors import InputError
from qkmodel.forward_batch import forward_sequences

CONTEXT, D_MODEL, VOCABULARY = 6, 16, 50
PLENTY = 10**12


def key(**fields) -> CacheKey:
    known = dict(
        weights_sha256="w", tokenizer_sha256="t", corpus_sha256="c", bos=None, context=CONTEXT, seed=0,
        validation_documents=0.1, dtype="bfloat16", products="float32", d_model=D_MODEL,
    )  # fmt: skip
    return CacheKey(**known | fields)


class SmallModel:
    """A causal network of matrix products: like a real one, it rounds differently in other batch sizes."""

    def __init__(self, seconds_per_batch=0.0):
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(VOCABULARY, D_MODEL, generator=generator)
        self.weights = torch.randn(12, D_MODEL, D_MODEL, generator=generator) / 4
        self.seconds_per_batch = seconds_per_batch
        self.forwarded = 0
        self.device = torch.device("cpu")

    def attention_inputs(self, tokens, layers):
        time.sleep(self.seconds_per_batch)
        self.forwarded += len(tokens)
        x = self.embedding[tokens].cumsum(dim=1)
        inputs = {}
        for layer in range(max(layers) + 1):
            x = torch.tanh(x @ self.weights[layer])
            if layer in layers:
                inputs[layer] = x
        return inputs

    def attention_inputs_of_batches(self, batches, layers, products, threads, stored):
        assert products == torch.float32
        # ahead of what is asked for, as threads are
        under_way = deque()
        for batch in batches:
            inputs = self.attention_inputs(batch, layers)
            under_way.append({layer: x.to(stored) for layer, x in inputs.items()})
            if len(under_way) > 3:
                yield under_way.popleft()
        yield from under_way


class SmallCorpus:
    """A loader of a corpus with so many sequences, which remembers what it was asked for."""

    def __init__(self, train=1000, validation=100, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = {
            "train": torch.randint(VOCABULARY, (train, CONTEXT), generator=generator, dtype=torch.int32),
            "validation": torch.randint(VOCABULARY, (validation, CONTEXT), generator=generator, dtype=torch.int32),
        }
        self.requests = []

    def __call__(self, train, validation):
        self.requests.append((train, validation))
        wanted = {"train": train, "validation": validation}
        available = {
            split: len(self.tokens[split]) if wanted[split] > len(self.tokens[split]) else None for split in wanted
        }
        return TokenisedCorpus(
            train=self.tokens["train"][:train],
            validation=self.tokens["validation"][:validation],
            bos=None,
            bos_id=None,
            train_documents=1,
            validation_documents=1,
            train_sequences_available=available["train"],
            validation_sequences_available=available["validation"],
        )


def build(
    root, *, layers=(2,), train=100, validation=70, streamed=0, model=None, corpus=None, max_bytes=PLENTY, **key_fields
):
    return build_activation_cache(
        root,
        key(**key_fields),
        layers=layers,
        train_sequences=train,
        validation_sequences=validation,
        streamed_sequences=streamed,
        max_bytes=max_bytes,
        model_loader=lambda: model or SmallModel(),
        corpus_loader=corpus or SmallCorpus(),
    )


def refuse(*arguments):
    pytest.fail("loaded although nothing was missing")


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2**-8), ("float32", 0)])
def test_reads_back_what_the_model_gives(tmp_path, dtype, tolerance):
    corpus = SmallCorpus()
    cache = build(tmp_path, layers=[4, 2], corpus=corpus, dtype=dtype)
    for split, indices in {"train": [3, 99, 64, 63, 3], "validation": [69, 0]}.items():
        tokens = corpus.tokens[split][indices].long()
        assert torch.equal(cache.tokens(split, indices), tokens)
        for layer, expected in SmallModel().attention_inputs(tokens, [2, 4]).items():
            found = cache.read(layer, split, indices)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-6)


def test_a_complete_cache_opens_without_model_or_corpus(tmp_path):
    build(tmp_path, layers=[2, 3])
    cache = build_activation_cache(
        tmp_path, key(), layers=[3], train_sequences=90, validation_sequences=70, max_bytes=1,
        model_loader=refuse, corpus_loader=refuse,
    )  # fmt: skip
    assert cache.read(3, "train", [89]).shape == (1, CONTEXT, D_MODEL)


def test_each_sequence_goes_through_the_model_once_for_all_layers(tmp_path):
    model = SmallModel()
    build(tmp_path, layers=[1, 5, 9], train=128, validation=64, model=model)
    assert model.forwarded == 192


def test_an_extended_cache_equals_a_fresh_larger_one(tmp_path):
    fresh = build(tmp_path / "fresh", layers=[2, 4], train=300, validation=100)
    build(tmp_path / "grown", layers=[4], train=10, validation=5)
    model = SmallModel()
    grown = build(tmp_path / "grown", layers=[2, 4], train=300, validation=100, model=model)
    assert files(grown.folder) == files(fresh.folder)
    assert model.forwarded == 320 + 100


def test_a_new_layer_reuses_tokens_and_old_layers(tmp_path):
    before = files(build(tmp_path, layers=[4]).folder)
    cache = build_activation_cache(
        tmp_path, key(), layers=[1, 4], train_sequences=100, validation_sequences=70, max_bytes=PLENTY,
        model_loader=SmallModel, corpus_loader=refuse,
    )  # fmt: skip
    after = files(cache.folder)
    assert {path: after[path] for path in before if path != MANIFEST} == {
        path: content for path, content in before.items() if path != MANIFEST
    }
    assert sorted({path.split("/")[0] for path in after}) == ["L01", "L04", MANIFEST, "tokens"]


def test_a_sequence_does_not_depend_on_how_many_were_asked_for(tmp_path):
    small = build(tmp_path / "small", train=1, validation=1, dtype="float32")
    large = build(tmp_path / "large", train=200, validation=100, dtype="float32")
    assert torch.equal(small.read(2, "train", [0]), large.read(2, "train", [0]))


def test_the_end_of_the_corpus_ends_the_cache(tmp_path):
    corpus = SmallCorpus(train=150, validation=40)
    cache = build(tmp_path, train=10_000, validation=64, corpus=corpus)
    assert cache.train_sequences_available == 150
    assert cache.validation_sequences_available == 40
    assert torch.equal(cache.tokens("train", range(150)), corpus.tokens["train"].long())
    with pytest.raises(InputError, match="tokens has no train sequence 150"):
        cache.tokens("train", [150])
    build(tmp_path, train=20_000, validation=100, corpus=refuse, model=refuse)


def test_the_corpus_is_unfinished_while_it_has_more(tmp_path):
    assert build(tmp_path, train=100).train_sequences_available is None


def build_slowly(root, seconds_per_batch):
    model = SmallModel(seconds_per_batch)
    build(root, layers=[2, 4], train=300, validation=70, model=model)
    return model.forwarded


def test_a_killed_build_is_continued_to_the_same_bytes(tmp_path):
    undisturbed = build(tmp_path / "undisturbed", layers=[2, 4], train=300, validation=70)
    root = tmp_path / "killed"
    folder = root / key().folder_name
    for shards in (1, 3):
        process = multiprocessing.get_context("spawn").Process(target=build_slowly, args=(root, 0.01))
        process.start()
        while len(list(folder.glob("L02/*.safetensors"))) < shards:
            assert process.is_alive()
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    (folder / "L02" / ".train-00001.safetensors.0.partial").write_bytes(b"half")
    recorded = len([path for path in json.loads((folder / MANIFEST).read_bytes())["shards"] if "L02" in path])
    assert 1 < recorded < 7
    model = SmallModel()
    assert files(build(root, layers=[2, 4], train=300, validation=70, model=model).folder) == files(undisturbed.folder)
    assert model.forwarded <= 320 + 100 - SHARD_SEQUENCES


def test_two_builders_at_once_build_once(tmp_path):
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        builders = [pool.submit(build_slowly, tmp_path, 0.05) for _ in range(2)]
        assert sorted(builder.result() for builder in builders) == [0, 320 + 100]
    cache = build(tmp_path, layers=[2, 4], train=300, validation=70, model=refuse, corpus=refuse)
    fresh = build(tmp_path / "fresh", layers=[2, 4], train=300, validation=70)
    assert files(cache.folder) == files(fresh.folder)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("part", ["L02", "tokens"])
@pytest.mark.parametrize("damage", [flip_a_bit, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_shard_is_rebuilt_alone(tmp_path, part, damage):
    folder = build(tmp_path, layers=[2, 4]).folder
    before = files(folder)
    damage(folder / part / "train-00001.safetensors")
    model = SmallModel()
    build(tmp_path, layers=[2, 4], model=model)
    assert files(folder) == before
    assert model.forwarded == (SHARD_SEQUENCES if part == "L02" else 0)


def test_a_truncated_shard_is_refused_by_readers(tmp_path):
    cache = build(tmp_path)
    path = cache.folder / "L02" / "train-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"train-00000.*start the sweep again"):
        ActivationCache.open(cache.folder).read(2, "train", [0])


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's memory accounting")
def test_a_mapped_shard_stays_in_the_page_cache(tmp_path):
    path = tmp_path / "shard.safetensors"
    size = 64 * 2**20
    save_file({TENSOR_NAME: torch.ones(size // 4)}, path)
    before = anonymous_bytes()
    shard = map_shard(path)
    assert shard.sum() == size // 4
    assert anonymous_bytes() - before < size // 4


def test_what_a_cache_cannot_serve_is_named(tmp_path):
    cache = build(tmp_path, layers=[2])
    with pytest.raises(InputError, match=r"L03/train-00000\.safetensors is not in this cache, which has layers \[2\]"):
        cache.read(3, "train", [0])
    with pytest.raises(InputError, match="not in this cache"):
        cache.read(2, "train", [128])
    with pytest.raises(InputError, match="no activation cache here"):
        ActivationCache.open(tmp_path)


def test_every_field_of_the_key_names_another_folder():
    others = dict(
        weights_sha256="x", tokenizer_sha256="x", corpus_sha256="x", bos="none", context=7, seed=1,
        validation_documents=0.2, dtype="float32", products="bfloat16", d_model=8,
    )  # fmt: skip
    assert others.keys() == CacheKey.model_fields.keys()
    names = {key(**{field: value}).folder_name for field, value in others.items()}
    assert len(names | {key().folder_name}) == len(others) + 1


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"format_version": 99}', "format version 99, but this program reads version 2"), ("{", "not an activation")],
)
def test_an_unknown_manifest_is_refused_and_left_alone(tmp_path, content, message):
    path = tmp_path / key().folder_name / MANIFEST
    path.parent.mkdir()
    path.write_text(content)
    for attempt in (lambda: build(tmp_path), lambda: ActivationCache.open(path.parent)):
        with pytest.raises(InputError, match=message):
            attempt()
    assert path.read_text() == content


def test_limits_are_refused_before_anything_is_written(tmp_path):
    needed = 228 * (key().bytes_per_sequence(TOKENS) + 2 * key().bytes_per_sequence("L02"))
    with pytest.raises(InputError, match=r"activations\.max_bytes: 228 sequences of 6 tokens at 2 layers") as error:
        build(tmp_path / "new", layers=[2, 4], validation=100, max_bytes=needed - 1, model=refuse)
    assert "raise it" in str(error.value)
    assert list(tmp_path.iterdir()) == []
    folder = build(tmp_path, layers=[2, 4], validation=100, max_bytes=needed).folder
    on_disk = sum(len(content) for path, content in files(folder).items() if path != MANIFEST)
    assert needed < on_disk < needed + 200 * 3 * 4


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match=r"needs .* more and 1\.0 KB are free"):
        build(tmp_path / "new", model=refuse)
    assert list(tmp_path.iterdir()) == []


def test_missing_work_is_what_the_build_then_does(tmp_path):
    def work(layers, train, validation):
        manifest = read_manifest(tmp_path / key().folder_name) or Manifest.empty(key())
        wanted = {"train": train, "validation": validation}
        return missing_work(manifest, CacheRequest(tuple(layers), wanted, wanted))

    everything = work([2, 4], 100, 70)
    assert everything.sequences == 256
    assert everything.bytes == 256 * CONTEXT * (2 * D_MODEL * 2 + 4)
    build(tmp_path, layers=[4], train=50, validation=128)
    model = SmallModel()
    left = work([2, 4], 100, 70)
    build(tmp_path, layers=[2, 4], model=model)
    assert left.sequences == model.forwarded == 128 + 100
    assert left.bytes == 228 * CONTEXT * D_MODEL * 2 + 64 * CONTEXT * (D_MODEL * 2 + 4)
    assert work([2, 4], 100, 70).sequences == work([2, 4], 100, 70).bytes == 0


def test_a_whole_cache_is_mended_whatever_the_limit_is_by_now(tmp_path):
    cache = build(tmp_path)
    shard = cache.folder / "L02/train-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    build(tmp_path, max_bytes=1)
    assert shard.read_bytes() == content


def test_streamed_sequences_are_cached_as_tokens_alone(tmp_path):
    cache = build(tmp_path, train=64, streamed=128)
    assert cache.tokens("train", range(192)).shape == (192, CONTEXT)
    assert cache.read(2, "train", range(64)).isfinite().all()
    with pytest.raises(InputError, match="L02/train-00001"):
        cache.read(2, "train", [64])
    # the same once more runs nothing, and a wish for all of it only what is missing
    build(tmp_path, train=64, streamed=128, model=refuse)
    model = SmallModel()
    build(tmp_path, train=192, model=model)
    assert model.forwarded == 128


def test_a_corpus_that_changed_is_noticed(tmp_path):
    build(tmp_path, train=64)
    with pytest.raises(InputError, match="no longer gives the tokens that are cached in tokens/train-00000"):
        build(tmp_path, train=128, corpus=SmallCorpus(seed=1))


def test_a_model_that_overflows_is_refused(tmp_path):
    model = SmallModel()
    model.weights[2, 0, 0] = torch.nan
    with pytest.raises(InputError, match="layer 3 receives NaN or infinity"):
        build(tmp_path, layers=[1, 3], model=model)


def test_progress_counts_the_tokens_that_were_missing(tmp_path):
    build(tmp_path, train=64, validation=64)
    seen = []
    build_activation_cache(
        tmp_path, key(), layers=[2], train_sequences=192, validation_sequences=64, max_bytes=PLENTY,
        model_loader=SmallModel, corpus_loader=SmallCorpus(), progress=seen.append,
    )  # fmt: skip
    # such short sequences go through the model a shard at a time
    assert [step.tokens_done for step in seen] == [64 * CONTEXT, 128 * CONTEXT]
    assert {step.tokens_total for step in seen} == {128 * CONTEXT}
    assert seen[-1].seconds_left == 0
    assert seen[0].seconds_left == pytest.approx(seen[0].seconds)


def test_a_shard_of_several_batches_has_them_in_their_order(tmp_path, monkeypatch):
    whole = build(tmp_path / "whole", layers=[2, 4])
    monkeypatch.setattr("qkmodel.activation_build.forward_sequences", lambda *_: 16)
    parts = build(tmp_path / "parts", layers=[2, 4])
    for layer in (2, 4):
        for split, sequences in (("train", range(64)), ("validation", range(40))):
            ours, theirs = (cache.read(layer, split, sequences) for cache in (parts, whole))
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("context", "sequences"), [(64, 32), (100, 16), (128, 16), (256, 8), (512, 2), (1024, 1), (4096, 1)]
)
def test_long_sequences_go_through_the_model_few_at_a_time(context, sequences):
    assert forward_sequences(context, "cpu", 8) == sequences
