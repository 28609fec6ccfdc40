"""Addresses of buckets: written one way, refused in one line, and never with a secret in it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cli import run
from orchestrator.cluster.submission import _same_place
from orchestrator.config import load_sweep
from orchestrator.ledger_place import named_places
from orchestrator.storage.address import BucketAddress, check_storage_text
from orchestrator.storage.bucket import Bucket
from orchestrator.storage.opened import open_in_bucket
from qkmodel.errors import InputError
from tests.orchestrator.sweep_files import write_sweep

BUCKETS = st.from_regex(r"[a-z0-9][a-z0-9-]{1,40}[a-z0-9]", fullmatch=True)
PARTS = st.lists(st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,10}", fullmatch=True), max_size=4)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "endpoint_override": st.sampled_from(["127.0.0.1:5000", "s3.example.org"]),
        "scheme": st.sampled_from(["http", "https"]),
        "region": st.just("eu-central-1"),
    },
)


@given(BUCKETS, PARTS, OPTIONS)
def test_an_address_is_read_as_it_was_written(bucket: str, parts: list[str], options: dict[str, str]) -> None:
    address = BucketAddress("s3", bucket, "/".join(parts), tuple(sorted(options.items())))
    assert BucketAddress.parse(address.text) == address
    assert address.key("a/b") == "/".join([bucket, *parts, "a", "b"])
    inside = BucketAddress.parse(address.url("sweep/dictionaries/id"))
    assert inside.split(3) == (address, "sweep/dictionaries/id")


@given(st.sets(st.tuples(BUCKETS, PARTS.map("/".join), OPTIONS.map(lambda found: tuple(sorted(found.items()))))))
def test_no_two_buckets_share_a_working_copy(addresses: set[tuple[str, str, tuple[tuple[str, str], ...]]]) -> None:
    assert len({Bucket(BucketAddress("s3", *one)).root for one in addresses}) == len(addresses)


def test_the_order_of_options_and_a_last_slash_say_nothing() -> None:
    one = BucketAddress.parse("s3://bucket/runs/?scheme=http&endpoint_override=127.0.0.1:9000")
    assert one == BucketAddress.parse("s3://bucket/runs?endpoint_override=127.0.0.1:9000&scheme=http")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ftp://bucket/runs", "must be the path of a folder, or s3://BUCKET/PREFIX"),
        ("s3://", "is no name of a bucket"),
        ("s3://Bucket/runs", "is no name of a bucket"),
        ("s3://bucket/runs//l1", "single slashes"),
        ("s3://bucket/../other", "single slashes"),
        ("s3://bucket/a b", "single slashes"),
        ("s3://bucket/runs?endpoint=x", "endpoint: is nothing to write after the ?"),
        ("s3://bucket/runs?endpoint_override=http://x:1", "is not HOST:PORT"),
        ("s3://bucket/runs?endpoint_override=a..b:9000", "is not HOST:PORT"),
        ("s3://bucket/runs?scheme=http&scheme=https", "twice"),
        ("gs://bucket/runs?region=europe", "region: is nothing to write after the ?"),
        ("s3://bucket/runs#part", "single slashes"),
    ],
)
def test_what_is_no_address_is_refused(text: str, said: str) -> None:
    with pytest.raises(InputError) as refused:
        check_storage_text(text)
    assert str(refused.value).startswith("storage: ") and said in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "s3://AKIAHUSHHUSH:hush-hush@bucket/runs",
        "s3://hush-hush@bucket/runs",
        "s3://AKIAHUSH:hush%40bucket/runs",
        "s3://bucket/runs?endpoint_override=somebody:hush%40127.0.0.1:9000",
        "s3://bucket/runs?access_key=hush-hush&secret_key=hush-hush",
        "s3://bucket/runs?session_token=hush-hush",
        "gs://bucket/runs?access_token=hush-hush",
    ],
)
def test_credentials_are_refused_and_not_shown(text: str) -> None:
    for read in (check_storage_text, open_in_bucket):
        with pytest.raises(InputError) as refused:
            read(text)
        assert "has credentials in it" in str(refused.value) and "hush" not in str(refused.value).lower()


AWAY = "s3://bucket/runs/l1?endpoint_override=127.0.0.1:9&scheme=http"


def test_a_sweep_named_in_a_bucket_that_is_away_is_refused_at_once(tmp_path: Path) -> None:
    config = load_sweep(write_sweep(tmp_path), [])
    with pytest.raises(InputError, match="no server answers there"):
        next(named_places("search.warm_start", AWAY, config))


def test_a_bucket_for_the_corpus_on_a_page_is_looked_at_before_the_dictionary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = str(tmp_path / "page.html")
    words = ["explain", str(tmp_path / "none"), "--head", "0", "--prompt", "Mary", "--output", page, "--storage", AWAY]
    assert run(words) == 2
    assert "no server answers there" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("other", ["s3://bucket/runs/", "s3://bucket/other", "runs"])
def test_jobs_in_a_bucket_are_of_one_place_however_it_is_written(other: str) -> None:
    job = SimpleNamespace(record=SimpleNamespace(storage=other, working_directory="/work"))
    assert _same_place(job, SimpleNamespace(storage="s3://bucket/runs")) is (other == "s3://bucket/runs/")
