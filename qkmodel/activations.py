"""The on-disk activation cache: what its files hold, and how a training reads them.

A cache is a folder named by the hash of its `CacheKey`:

    manifest.json                       key, counts, and every shard's size and SHA-256; written last
    tokens/train-00000.safetensors      int32 [sequences, context]
    L08/train-00000.safetensors         bf16 or fp32 [sequences, context, d_model], the tensor that layer 8's
                                        query and key projections receive
    L08/validation-00000.safetensors

Shard n holds sequences 64·n to 64·n + 63 of its split, in every folder; only a corpus's very last shard is
shorter. A shard that the manifest does not list does not exist, whatever lies on disk.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, Self

import torch
from jaxtyping import Float, Float32, Int64
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qkmodel.errors import InputError
from qkmodel.schema import Schema

# Raise it when the layout changes, or when `corpus.tokenise` orders sequences differently.
FORMAT_VERSION = 2
SHARD_SEQUENCES = 64
TENSOR_NAME = "data"
MANIFEST = "manifest.json"
TOKENS = "tokens"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


class CacheKey(Schema):
    """Everything that decides what a cache's sequences and activations are; layers and counts may grow.

    `products` is the element type of the matrix products of the model's forward pass.
    """

    weights_sha256: str
    tokenizer_sha256: str
    corpus_sha256: str
    bos: str | None
    context: int = Field(ge=2)
    seed: int = Field(ge=0)
    validation_documents: float = Field(gt=0, lt=1)
    dtype: Literal["bfloat16", "float32"]
    products: Literal["bfloat16", "float32"]
    d_model: int = Field(ge=1)

    @property
    def folder_name(self) -> str:
        content = json.dumps([FORMAT_VERSION, self.model_dump()], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def bytes_per_sequence(self, part: str) -> int:
        """One sequence's bytes in a part of the cache: its tokens, or its activations at a layer."""
        return self.context * (4 if part == TOKENS else self.d_model * DTYPES[self.dtype].itemsize)


class Shard(Schema):
    """One file of the cache."""

    sequences: int = Field(ge=1, le=SHARD_SEQUENCES)
    sha256: str


class Manifest(Schema):
    """What a cache holds. `shards` goes by path inside the folder.

    `available` is the number of sequences that the whole corpus has in a split, None while unknown.
    """

    format_version: int
    key: CacheKey
    available: dict[Split, int | None]
    shards: dict[str, Shard]

    @classmethod
    def empty(cls, key: CacheKey) -> Self:
        """The manifest of a cache that has nothing yet."""
        return cls(format_version=FORMAT_VERSION, key=key, available={split: None for split in SPLITS}, shards={})

    def with_available(self, counts: Mapping[Split, int | None]) -> Self:
        """The same cache, once more is known of how many sequences the corpus has."""
        known = {split: count for split, count in counts.items() if count is not None}
        return self.model_copy(update={"available": self.available | known})

    @property
    def layers(self) -> list[int]:
        return sorted({int(path[1:].split("/")[0]) for path in self.shards if path.startswith("L")})

    def needed(self, split: Split, sequences: int) -> list[int]:
        """The size of each shard that a request for `sequences` takes."""
        return shard_sizes(sequences, self.available[split])

    def sequences_needed(self, split: Split, sequences: int) -> int:
        """The sequences in these shards."""
        return in_whole_shards(sequences, self.available[split])

    def missing_sequences(self, parts: Sequence[str], wanted: Mapping[Split, int]) -> int:
        """The sequences in the shards that `missing` lists. Lists none itself: a request may be beyond all reason."""
        missing = 0
        for split in SPLITS:
            total = self.sequences_needed(split, wanted[split])
            begins = [index * SHARD_SEQUENCES for index in self._complete_shards(parts, split)]
            missing += total - sum(min(SHARD_SEQUENCES, total - begin) for begin in begins if begin < total)
        return missing

    def _complete_shards(self, parts: Sequence[str], split: Split) -> list[int]:
        """Numbers of the shards that have all of `parts`."""
        start = f"{parts[0]}/{split}-"
        numbers = [int(path.removeprefix(start).split(".")[0]) for path in self.shards if path.startswith(start)]
        return [number for number in numbers if all(shard_path(part, split, number) in self.shards for part in parts)]

    def missing(self, parts: Sequence[str], wanted: Mapping[Split, int]) -> list["MissingShard"]:
        """The shards that a request for `wanted` sequences takes and that lack any of `parts`."""
        shards = [
            MissingShard(
                split, index, size, tuple(part for part in parts if shard_path(part, split, index) not in self.shards)
            )
            for split in SPLITS
            for index, size in enumerate(self.needed(split, wanted[split]))
        ]
        return [shard for shard in shards if shard.parts]


@dataclass(frozen=True)
class MissingShard:
    """Sequences of a split that some parts (tokens, layers) of a cache lack."""

    split: Split
    index: int
    sequences: int
    parts: tuple[str, ...]


class Copies(Protocol):
    """What reads shards from somewhere else than the cache's folder."""

    def map(self, original: Path, name: str, shard: Shard) -> Tensor:
        """The tensor of the shard that would lie at `original`; `name` is that of its cache, part and file."""


class ActivationCache:
    """A cache open for reading. Rows are copied out of memory-mapped files, which processes on a node share."""

    def __init__(self, folder: Path, manifest: Manifest, copies: Copies | None = None):
        self.folder = folder
        self.manifest = manifest
        self._copies = copies
        self._mapped: dict[str, Tensor] = {}

    @classmethod
    def open(cls, folder: Path, copies: Copies | None = None) -> Self:
        """Read the manifest alone; shards are opened as they are needed, from `copies` if they are given.

        Checksums are compared where the cache is built, not here. Raises InputError when `folder` is no
        cache or one of an unknown version.
        """
        manifest = read_manifest(folder)
        if manifest is None:
            raise InputError(f"{folder}: no activation cache here, {MANIFEST} is missing")
        return cls(folder, manifest, copies)

    @property
    def context(self) -> int:
        return self.manifest.key.context

    @property
    def train_sequences_available(self) -> int | None:
        """Training sequences of the whole corpus, None when it has more than anyone has asked for."""
        return self.manifest.available["train"]

    @property
    def validation_sequences_available(self) -> int | None:
        """Validation sequences of the whole corpus, None when it has more than anyone has asked for."""
        return self.manifest.available["validation"]

    def read(self, layer: int, split: Split, indices: Iterable[int]) -> Float32[Tensor, "sequence context d_model"]:
        """The activations of the sequences `indices`, in that order.

        Raises InputError for a sequence or layer that is not in the cache, or a shard that cannot be read.
        """
        return self.read_stored(layer, split, indices).float()

    def read_stored(
        self, layer: int, split: Split, indices: Iterable[int]
    ) -> Float[Tensor, "sequence context d_model"]:
        """The same in the element type it is stored in."""
        row_shape, dtype = (self.context, self.manifest.key.d_model), DTYPES[self.manifest.key.dtype]
        return self._gather(layer_part(layer), split, indices, row_shape, dtype)

    def tokens(self, split: Split, indices: Iterable[int]) -> Int64[Tensor, "sequence context"]:
        """The token ids of the sequences `indices`, in that order. Raises InputError as `read` does."""
        return self._gather(TOKENS, split, indices, (self.context,), torch.int64)

    def _gather(
        self, part: str, split: Split, indices: Iterable[int], row_shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        wanted = [int(index) for index in indices]
        rows = torch.empty(len(wanted), *row_shape, dtype=dtype)
        for row, index in zip(rows, wanted, strict=True):
            shard, offset = divmod(index, SHARD_SEQUENCES)
            stored = self._shard(shard_path(part, split, shard))
            if offset >= len(stored):
                raise InputError(f"{self.folder}: {part} has no {split} sequence {index}")
            row.copy_(stored[offset])
        return rows

    def _shard(self, path: str) -> Tensor:
        if path not in self._mapped:
            if path not in self.manifest.shards:
                raise InputError(f"{self.folder}: {path} is not in this cache, which has layers {self.manifest.layers}")
            original = self.folder / path
            if self._copies is None:
                self._mapped[path] = map_shard(original)
            else:
                name, shard = f"{self.folder.name}/{path}", self.manifest.shards[path]
                self._mapped[path] = self._copies.map(original, name, shard)
        return self._mapped[path]


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a cache, None where there is none.

    Raises InputError for an unknown format version and for a manifest that does not parse.
    """
    path = folder / MANIFEST
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); remove the folder to build it anew") from error


def parse_manifest(content: bytes, path: str) -> Manifest:
    """The manifest whose bytes were read at `path`. Raises InputError as `read_manifest`."""
    try:
        found = json.loads(content)
        version = found["format_version"]
        if version != FORMAT_VERSION:
            raise InputError(
                f"{path}: activation cache of format version {version}, but this program reads version "
                f"{FORMAT_VERSION}; remove the folder to build it anew"
            )
        return Manifest.model_validate(found)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValidationError) as error:
        raise InputError(f"{path}: not an activation cache's manifest; remove the folder to build it anew") from error


def map_shard(path: Path) -> Tensor:
    """A shard's tensor, backed by the file: pages are read when rows are. Raises InputError when it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(TENSOR_NAME)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged or missing shard ({error}); start the sweep again to rebuild it") from error


def layer_part(layer: int) -> str:
    return f"L{layer:02d}"


def shard_path(part: str, split: Split, index: int) -> str:
    return f"{part}/{split}-{index:05d}.safetensors"


def shard_sizes(wanted: int, available: int | None) -> list[int]:
    """Sequences in each shard that a request for `wanted` needs.

    Whole shards are built even for part of one, so that no sequence's bytes depend on what was asked for:
    a matrix product rounds differently in a batch of another size.
    """
    total = in_whole_shards(wanted, available)
    return [min(SHARD_SEQUENCES, total - start) for start in range(0, total, SHARD_SEQUENCES)]


def in_whole_shards(wanted: int, available: int | None) -> int:
    """The sequences in all these shards together."""
    total = -(-wanted // SHARD_SEQUENCES) * SHARD_SEQUENCES
    return total if available is None else min(total, available)
