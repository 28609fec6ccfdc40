"""A bucket and the working copy of it: what is sent last, what is known for a copy, what a failed upload leaves."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import NativeFile

from orchestrator.checkpoints import Checkpoints, checkpoint_path, drop_older
from orchestrator.ledger_pointer import POINTER_FILE, LedgerPointer
from orchestrator.pack_files import PackFiles
from orchestrator.pack_order import CopiesOrder, PackOrder
from orchestrator.permit import BUCKET_SECONDS, Permit, PermitReader, ask_to_stop, grant
from orchestrator.storage.bucket import Bucket
from orchestrator.storage.shared import StorageGivesOut
from orchestrator.storage_check import check_bucket
from orchestrator.stored_cache import StoredCache
from qkmodel.activation_request import CacheRequest
from qkmodel.activations import MANIFEST, SPLITS, TOKENS, ActivationCache, Manifest, parse_manifest
from qkmodel.errors import InputError
from qkmodel.files import PARTIAL_SUFFIX
from tests.orchestrator.bucket_world import FolderAsStore, bucket_in
from tests.orchestrator.test_pack_order import small_order
from tests.qkmodel.world import LAYER, SmallWorld, make_world

FILES = ("attention.safetensors", "config.json", "transcoder.safetensors")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    return bucket_in(tmp_path, monkeypatch)[0]


@pytest.fixture
def store(bucket: Bucket) -> FolderAsStore:
    return bucket._files


def put(path: Path, content: str = "content") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


@pytest.mark.parametrize("fails_at", range(4))
def test_a_folder_counts_only_once_all_of_it_is_there(bucket: Bucket, store: FolderAsStore, fails_at: int) -> None:
    folder = bucket.root / "l1" / "dictionaries" / "id-0001"
    for name in FILES:
        put(folder / name)
    store.fails_at = fails_at
    if fails_at < len(FILES):
        with pytest.raises(StorageGivesOut, match=r"s3://bucket/runs/l1/.*: no server answers; once that is mended"):
            bucket.send(folder, last="config.json")
    else:
        bucket.send(folder, last="config.json")
    there = {key.rpartition("/")[2] for key in store.objects()}
    assert len(there) == min(fails_at, len(FILES)) and ("config.json" not in there or there == set(FILES))


def test_what_was_sent_is_fetched_once_and_again_when_it_changed(bucket: Bucket, store: FolderAsStore) -> None:
    file = put(bucket.root / "l1" / "report.html")
    bucket.send(file)
    assert bucket.fetch(file) and store.reads == []
    bucket.release(file)
    assert not file.parent.exists()
    assert bucket.fetch(file) and file.read_text() == "content" and len(store.reads) == 1
    assert bucket.fetch(file) and len(store.reads) == 1
    bucket.write(file, b"other content")
    assert bucket.fetch(file) and file.read_text() == "other content"
    put(file, "changed here")
    assert bucket.fetch(file) and file.read_text() == "other content"
    bucket.remove(file)
    assert not bucket.fetch(file) and not file.exists() and bucket.read(file) is None
    assert not list(bucket.root.rglob("*.partial"))


def test_a_folder_is_fetched_as_it_is_in_the_bucket(bucket: Bucket) -> None:
    folder = bucket.root / "l1" / "dictionaries" / "id-0001"
    for name in FILES:
        put(folder / name)
    bucket.send(folder)
    bucket.remove(folder / FILES[0])
    being_fetched = put(folder / f".{FILES[0]}.0{PARTIAL_SUFFIX}")
    put(folder / FILES[0])
    assert bucket.fetch(folder)
    assert {path.name for path in folder.iterdir()} == {*FILES[1:], being_fetched.name}


def test_what_another_process_removed_just_now_is_removed(
    bucket: Bucket, store: FolderAsStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(key: str) -> None:
        raise FileNotFoundError(key)

    file = put(bucket.root / "l1" / "file")
    bucket.send(file)
    monkeypatch.setattr(store, "delete_file", gone, raising=False)
    bucket.remove(file)
    assert not file.exists()


def test_a_dictionary_that_was_handed_over_leaves_the_folder_that_other_packs_write_to(bucket: Bucket) -> None:
    folder = bucket.root / "l1" / "dictionaries" / "id-0001"
    put(folder / FILES[0])
    bucket.send(folder)
    bucket.release(folder)
    assert not folder.exists() and folder.parent.is_dir()


def test_what_was_fetched_and_is_as_it_was_is_not_sent_again(bucket: Bucket, store: FolderAsStore) -> None:
    file = put(bucket.root / "reference.safetensors")
    bucket.send_changed(file)
    bucket.send_changed(file)
    assert len(store.uploads) == 1
    put(file, "made again")
    bucket.send_changed(file)
    assert len(store.uploads) == 2


def test_checkpoints_are_those_in_the_bucket(bucket: Bucket, store: FolderAsStore) -> None:
    folder = bucket.root / "l1"
    paths = [checkpoint_path(folder, 1, "id", steps) for steps in (8, 16, 24)]
    for path in paths:
        bucket.send(put(path, "nonsense"))
        bucket.release(path)
        drop_older(path, bucket)
    assert bucket.names(paths[0].parent) == [path.name for path in paths[1:]]
    assert list(Checkpoints(folder, bucket).whole("id")) == []
    assert bucket.names(paths[0].parent) == [f"{path.name}.damaged" for path in paths[1:]]
    Checkpoints(folder, bucket).discard("id")
    assert bucket.names(paths[0].parent) == [] and not list(bucket.root.rglob("*.safetensors*"))


def test_a_permit_is_asked_for_every_two_seconds(
    bucket: Bucket, store: FolderAsStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("orchestrator.permit.time.monotonic", lambda: now)
    folder = bucket.root / "l1"
    grant(folder, 3, bucket)
    permits = PermitReader(folder, 3, bucket)
    assert [permits.current() for _ in range(9)] == [Permit.GO] * 9 and len(store.reads) == 1
    ask_to_stop(folder, 3, bucket)
    now += BUCKET_SECONDS - 0.01
    assert permits.current() is Permit.GO
    now += 0.01
    assert permits.current() is Permit.STOP and len(store.reads) == 2
    grant(folder, 4, bucket)
    assert permits.current() is Permit.STOP and permits.now() is Permit.FENCED and permits.current() is Permit.FENCED


def request_of(world: SmallWorld) -> CacheRequest:
    shards = world.cache.manifest.shards.items()
    counts = {
        split: sum(shard.sequences for path, shard in shards if path.startswith(f"{TOKENS}/{split}"))
        for split in SPLITS
    }
    return CacheRequest((LAYER,), counts, counts)


def copy_of(world: SmallWorld, bucket: Bucket) -> Path:
    """The world's cache as if it had been built in this machine's working copy."""
    folder = bucket.root / "activations" / world.cache.folder.name
    for name in (*world.cache.manifest.shards, MANIFEST):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((world.cache.folder / name).read_bytes())
    return folder


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(fails_at=st.integers(0, 12))
def test_a_cache_in_the_bucket_lists_nothing_that_is_not_there(
    world: SmallWorld, tmp_path_factory: pytest.TempPathFactory, fails_at: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        bucket, store = bucket_in(tmp_path_factory.mktemp("bucket"), patch)
        folder = copy_of(world, bucket)
        cache = StoredCache(folder, bucket)
        store.fails_at = fails_at
        try:
            cache.send()
        except StorageGivesOut:
            key = f"bucket/runs/activations/{folder.name}/{MANIFEST}"
            assert key not in store.objects()
        store.fails_at = None
        cache.send()
        listed = parse_manifest(bucket.read(folder / MANIFEST), "").shards
        assert listed == world.cache.manifest.shards
        assert {f"bucket/runs/activations/{folder.name}/{name}" for name in (*listed, MANIFEST)} == store.objects()
        # and nothing is sent twice
        shards = [key for key in store.uploads if not key.endswith(MANIFEST)]
        assert len(shards) == len(set(shards))


def test_a_cache_is_fetched_on_another_machine(
    world: SmallWorld, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    StoredCache(copy_of(world, bucket), bucket).send()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    folder = bucket.root / "activations" / world.cache.folder.name
    cache = StoredCache(folder, bucket)
    cache.refresh()
    assert ActivationCache.open(folder).manifest == world.cache.manifest and not list(folder.rglob("*.safetensors"))
    reading = ActivationCache.open(folder, cache.copies)
    assert reading.read(LAYER, "validation", [0]).equal(world.cache.read(LAYER, "validation", [0]))
    cache.fetch(request_of(world))
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")} == set(
        world.cache.manifest.shards
    )


def test_what_was_built_here_and_not_sent_is_kept_and_sent(world: SmallWorld, bucket: Bucket) -> None:
    folder = copy_of(world, bucket)
    whole = ActivationCache.open(folder).manifest
    first, *others = whole.shards
    half = whole.model_copy(update={"shards": {first: whole.shards[first]}})
    (folder / MANIFEST).write_text(half.model_dump_json())
    StoredCache(folder, bucket).send()
    rest = whole.model_copy(update={"shards": {name: whole.shards[name] for name in others}})
    (folder / MANIFEST).write_text(rest.model_dump_json())
    cache = StoredCache(folder, bucket)
    cache.refresh()
    assert ActivationCache.open(folder).manifest.shards.keys() == whole.shards.keys()
    cache.send()
    assert parse_manifest(bucket.read(folder / MANIFEST), "").shards == whole.shards


def test_a_shard_that_was_damaged_and_built_again_replaces_the_one_in_the_bucket(
    world: SmallWorld, bucket: Bucket
) -> None:
    folder = copy_of(world, bucket)
    name = next(iter(world.cache.manifest.shards))
    bucket.write(folder / name, b"nonsense")
    cache = StoredCache(folder, bucket)
    cache.send()
    assert bucket.read(folder / name) == (world.cache.folder / name).read_bytes()


def test_what_this_machine_has_otherwise_replaces_nothing_in_the_bucket(world: SmallWorld, bucket: Bucket) -> None:
    folder = copy_of(world, bucket)
    StoredCache(folder, bucket).send()
    name = next(iter(world.cache.manifest.shards))
    sent = bucket.read(folder / name)
    # built here once and never sent; of a layer, say, that this start does not ask for
    (folder / name).write_bytes(b"x" * len(sent))
    cache = StoredCache(folder, bucket)
    cache.refresh()
    cache.send()
    assert bucket.read(folder / name) == sent
    assert parse_manifest(bucket.read(folder / MANIFEST), "").shards == world.cache.manifest.shards


def test_a_pack_reads_copies_and_the_drivers_machine_holds_them_once(
    world: SmallWorld, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(world, bucket)
    StoredCache(folder, bucket).send()
    reference = put(folder / "reference" / "r.safetensors")
    bucket.send(reference)
    monkeypatch.setattr("orchestrator.pack_files.open_storage", lambda url: bucket)
    order = small_order(bucket.url, bucket.root, folder, reference)
    cache = PackFiles.of(order).open_cache()
    assert cache.read(LAYER, "validation", [0]).equal(world.cache.read(LAYER, "validation", [0]))
    (copy,) = (tmp_path / "home" / "qkmodel" / "shards").rglob("*.safetensors")
    assert os.stat(copy).st_nlink == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "node"))
    there = PackFiles.of(order)
    assert there.order.reference_file.is_relative_to(tmp_path / "node")
    cache = there.open_cache()
    assert there.order.reference_file.read_text() == "content"
    assert cache.read(LAYER, "validation", [0]).equal(world.cache.read(LAYER, "validation", [0]))
    (copy,) = (tmp_path / "node").rglob("validation-*.safetensors")
    assert os.stat(copy).st_nlink == 1
    full = order.model_copy(update={"copies": CopiesOrder(folder=tmp_path / "full", max_bytes=10)})
    with pytest.raises(StorageGivesOut, match=r"no room for \d+ bytes.*node_max_bytes"):
        PackFiles.of(full).open_cache().read(LAYER, "validation", [0])


def test_a_ledgers_place_that_cannot_be_read_is_named_by_its_address(bucket: Bucket) -> None:
    bucket.write(bucket.root / "l1" / POINTER_FILE, b"nonsense")
    with pytest.raises(InputError, match=r"^s3://bucket/runs/l1/ledger.json: does not say where"):
        LedgerPointer.read(bucket.root / "l1", bucket)


def test_an_empty_manifest_is_nothing_to_send(world: SmallWorld, bucket: Bucket, store: FolderAsStore) -> None:
    folder = bucket.root / "activations" / "none"
    cache = StoredCache(folder, bucket)
    cache.refresh()
    cache.fetch(request_of(world))
    cache.send()
    assert store.uploads == [] and Manifest.empty(world.cache.manifest.key).shards == {}


@pytest.fixture
def order(world: SmallWorld, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> PackOrder:
    """Of a pack on the driver's machine, whose cache is in the bucket."""
    folder = copy_of(world, bucket)
    StoredCache(folder, bucket).send()
    reference = put(folder / "reference" / "r.safetensors")
    bucket.send(reference)
    monkeypatch.setattr("orchestrator.pack_files.open_storage", lambda url: bucket)
    return small_order(bucket.url, bucket.root, folder, reference)


def test_a_kill_between_a_link_and_its_name_is_no_hindrance(
    world: SmallWorld, order: PackOrder, tmp_path: Path
) -> None:
    PackFiles.of(order).open_cache().read(LAYER, "validation", [0])
    (copy,) = (tmp_path / "home" / "qkmodel" / "shards").rglob("*.safetensors")
    copy.rename(copy.with_name(f"{copy.name}{PARTIAL_SUFFIX}"))
    cache = PackFiles.of(order).open_cache()
    assert cache.read(LAYER, "validation", [0]).equal(world.cache.read(LAYER, "validation", [0]))
    assert copy.exists()


def test_a_node_with_another_file_reads_what_is_in_the_bucket(world: SmallWorld, order: PackOrder) -> None:
    shard = order.cache_folder / f"L{LAYER:02d}" / "validation-00000.safetensors"
    shard.write_bytes(b"x" * shard.stat().st_size)
    cache = PackFiles.of(order).open_cache()
    assert cache.read(LAYER, "validation", [0]).equal(world.cache.read(LAYER, "validation", [0]))


def test_a_store_that_is_away_is_said_as_that(
    order: PackOrder, store: FolderAsStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(key: str) -> NativeFile:
        raise OSError("AWS Error NETWORK_CONNECTION during GetObject operation")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "node"))
    cache = PackFiles.of(order).open_cache()
    monkeypatch.setattr(store, "open_input_stream", away)
    with pytest.raises(StorageGivesOut, match=r"^s3://[^ ]*: no server answers; once that is mended[^;]*$"):
        cache.read(LAYER, "validation", [0])


def test_a_look_that_fails_in_any_way_is_a_refusal(store: FolderAsStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(key: str) -> NativeFile:
        raise FileNotFoundError(f"{key}: is gone")

    monkeypatch.setattr(store, "open_output_stream", gone)
    with pytest.raises(FileNotFoundError):
        check_bucket("s3://bucket/runs")
