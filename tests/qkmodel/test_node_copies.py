"""Copies of shards on a node's own disk: once, whole, within their limit, and never in the way."""

import hashlib
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from qkmodel.activations import TENSOR_NAME, ActivationCache
from qkmodel.errors import InputError
from qkmodel.node_copies import NodeCopies
from tests.qkmodel.world import LAYER, SmallWorld

ROWS = [0, 5, 63]


@pytest.fixture
def shared(world: SmallWorld, tmp_path: Path) -> Path:
    """An activation cache of the test's own."""
    return shutil.copytree(world.cache.folder, tmp_path / "shared" / "cache")


def opened(shared: Path, node: Path, max_bytes: int = 10**9) -> ActivationCache:
    return ActivationCache.open(shared, NodeCopies(node, max_bytes))


def copies(node: Path) -> list[str]:
    """Without the hashes in their names."""
    found = (path.with_stem(path.stem.rpartition("-")[0]) for path in node.rglob("*.safetensors"))
    return sorted(path.relative_to(node).as_posix() for path in found)


def shard(name: str) -> str:
    return f"L{LAYER:02d}/{name}-00000.safetensors"


def test_a_shard_is_copied_when_it_is_first_read_and_not_again(world: SmallWorld, shared: Path, tmp_path: Path) -> None:
    node = tmp_path / "node"
    cache = opened(shared, node)
    assert not node.exists()
    expected = world.cache.read(LAYER, "validation", ROWS)
    assert torch.equal(cache.read(LAYER, "validation", ROWS), expected)
    assert copies(node) == [f"cache/{shard('validation')}"]
    (shared / shard("validation")).unlink()
    assert torch.equal(opened(shared, node).read(LAYER, "validation", ROWS), expected)


def test_what_is_not_what_the_manifest_says_is_not_copied(shared: Path, tmp_path: Path) -> None:
    path = shared / shard("validation")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=r"validation-00000\.safetensors: damaged shard"):
        opened(shared, tmp_path / "node").read(LAYER, "validation", ROWS)
    assert copies(tmp_path / "node") == [] and list(tmp_path.rglob("*.partial")) == []


def test_a_shard_that_was_built_again_with_other_bits_is_copied_again(shared: Path, tmp_path: Path) -> None:
    node = tmp_path / "node"
    cache = opened(shared, node)
    before = cache.read(LAYER, "validation", ROWS)
    content = save({TENSOR_NAME: torch.zeros(64, *before.shape[1:], dtype=torch.bfloat16)})
    (shared / shard("validation")).write_bytes(content)
    entry = cache.manifest.shards[shard("validation")].model_copy(
        update={"sha256": hashlib.sha256(content).hexdigest()}
    )
    manifest = cache.manifest.model_copy(update={"shards": cache.manifest.shards | {shard("validation"): entry}})
    again = ActivationCache(shared, manifest, NodeCopies(node, 10**9)).read(LAYER, "validation", ROWS)
    assert not torch.equal(again, before) and not again.any()


def test_the_part_used_longest_ago_gives_way(world: SmallWorld, shared: Path, tmp_path: Path) -> None:
    node = tmp_path / "node"
    other = shutil.copytree(shared, tmp_path / "shared" / "other")
    size = (shared / shard("validation")).stat().st_size
    for folder in (shared, other, shared):
        opened(folder, node, 2 * size).read(LAYER, "validation", ROWS)
    third = shutil.copytree(shared, tmp_path / "shared" / "third")
    assert torch.equal(
        opened(third, node, 2 * size).read(LAYER, "validation", ROWS), world.cache.read(LAYER, "validation", ROWS)
    )
    assert copies(node) == [f"{name}/{shard('validation')}" for name in ("cache", "third")]


def test_an_open_copy_stays_and_what_finds_no_room_is_read_where_it_is(
    world: SmallWorld, shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node = tmp_path / "node"
    other = shutil.copytree(shared, tmp_path / "shared" / "other")
    size = (shared / shard("validation")).stat().st_size
    first = opened(shared, node, size)
    first.read(LAYER, "validation", ROWS)
    with caplog.at_level(logging.WARNING):
        found = opened(other, node, size).read(LAYER, "validation", ROWS)
    assert torch.equal(found, world.cache.read(LAYER, "validation", ROWS))
    assert copies(node) == [f"cache/{shard('validation')}"] and "no room" in caplog.text
    del first
    opened(other, node, size).read(LAYER, "validation", ROWS)
    assert copies(node) == [f"other/{shard('validation')}"]


def test_what_a_killed_process_left_is_no_copy_and_gives_way(shared: Path, tmp_path: Path) -> None:
    node = tmp_path / "node"
    opened(shared, node).read(LAYER, "validation", ROWS)
    (node / "total").write_text("")
    (node / "cache" / f"L{LAYER:02d}" / "train-00000.safetensors.partial").write_bytes(b"half" * 10**6)
    other = shutil.copytree(shared, tmp_path / "shared" / "other")
    opened(other, node, 2 * (shared / shard("validation")).stat().st_size).read(LAYER, "validation", ROWS)
    assert copies(node) == [f"other/{shard('validation')}"] and list(node.rglob("*.partial")) == []


def test_the_total_that_is_kept_is_what_the_copies_take(shared: Path, tmp_path: Path) -> None:
    node = tmp_path / "node"
    cache = opened(shared, node)
    for split in ("validation", "train"):
        cache.read(LAYER, split, [0])
        cache.tokens(split, [0])
    assert len(copies(node)) == 4
    taken = sum(path.stat().st_size for path in node.rglob("*.safetensors"))
    assert int((node / "total").read_text()) == taken


def test_a_disk_that_cannot_be_used_is_done_without(
    world: SmallWorld, shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    with caplog.at_level(logging.WARNING):
        found = opened(shared, tmp_path / "file" / "node").read(LAYER, "validation", ROWS)
    assert torch.equal(found, world.cache.read(LAYER, "validation", ROWS))
    assert "is read where it is" in caplog.text
