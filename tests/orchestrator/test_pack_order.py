"""An order's paths on another machine."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.pack_order import BucketOrder, CopiesOrder, MemberOrder, PackOrder, SourceOrder
from qkmodel.configs import CorpusConfig, ModelConfig, TrainingConfig
from qkmodel.dictionary import CorpusIdentity, ModelIdentity
from qkmodel.hyperparameters import Hyperparameters

NAMES = st.lists(st.from_regex(r"[a-z0-9-]{1,8}", fullmatch=True), min_size=1, max_size=3).map("/".join)
ROOTS = st.sampled_from(["/home/a/.cache/qkmodel/storage/b-1", "/root/x", "/home/a/.cache/qkmodel/storage"]).map(Path)


def small_order(
    url: str | None,
    root: Path,
    cache_folder: Path,
    reference_file: Path,
    checkpoint: Path | None = None,
    sources: dict[str, SourceOrder] | None = None,
) -> PackOrder:
    """One TopK training of a sweep in a bucket, or of one in a folder at `root`."""
    hyperparameters = Hyperparameters(dictionary_size=16, activation="topk", k=2, learning_rate=1e-3)
    return PackOrder(
        task="transcoder",
        start=1,
        pack_id="pack",
        members=(MemberOrder(training_id="id", hyperparameters=hyperparameters, checkpoint=checkpoint),),
        steps_done=0,
        last_step=1,
        device="cpu",
        threads=1,
        bucket=BucketOrder(url=url, root=root) if url is not None else None,
        sweep_folder=root / "l1",
        cache_folder=cache_folder,
        copies=CopiesOrder(folder=None, max_bytes=10**9),
        streamed=False,
        reference_file=reference_file,
        sources=sources or {},
        model_identity=ModelIdentity(config=ModelConfig(name="random"), weights_sha256="w", layer=1, hook="h"),
        corpus_identity=CorpusIdentity(config=CorpusConfig(name="c"), bos="b", sha256="c"),
        training=TrainingConfig(tokens=1000),
        seed=0,
    )


@given(ROOTS, ROOTS, NAMES, NAMES, NAMES)
def test_paths_in_the_working_copy_move_with_it(here: Path, there: Path, cache: str, file: str, other: str) -> None:
    source = SourceOrder(folder=here / file, sha256="s", candidates=here / cache / file, calibration_sequences=1)
    order = small_order("s3://bucket", here, here / cache, Path("/elsewhere") / other, here / other, {"s": source})
    moved = order.rebased(there)
    assert moved.cache_folder == there / cache and moved.sweep_folder == there / "l1"
    assert moved.members[0].checkpoint == there / other
    assert (moved.sources["s"].folder, moved.sources["s"].candidates) == (there / file, there / cache / file)
    # what is in no storage is where it is
    assert moved.reference_file == order.reference_file
    assert order.rebased(here) == order and moved.rebased(here) == order


def test_an_order_of_a_shared_folder_stays(tmp_path: Path) -> None:
    order = small_order(None, tmp_path, tmp_path / "cache", tmp_path / "reference")
    assert order.rebased(Path("/elsewhere")) is order
