"""The pairs that masks of one dictionary are trained on, kept on disk: the most salient of all there are."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from qkmodel.activations import ActivationCache
from qkmodel.attention import AttentionLayer
from qkmodel.errors import InputError
from qkmodel.pair_mask.pair_set import PairSet
from qkmodel.pair_mask.saliency import SalientPairs, passes, salient_pairs
from qkmodel.pair_mask.score_terms import SequenceCodes, sequence_codes
from qkmodel.progress import TokenProgress
from qkmodel.schema import Schema
from qkmodel.tensor_file import read_tensor_file, write_tensor_file
from qkmodel.transcoder import QKTranscoder


class CandidatesHeader(Schema):
    """Where candidates come from; `shape` is (heads, query features, key features), `salient` as in `SalientPairs`."""

    format: Literal[1] = 1
    dictionary_sha256: str
    calibration_sequences: int
    shape: tuple[int, int, int]
    salient: int


def candidates_path(folder: Path, dictionary_sha256: str, calibration_sequences: int, most: int) -> Path:
    """Where the `most` most salient pairs of a dictionary lie, by what decides which they are."""
    return folder / f"{dictionary_sha256[:16]}-{calibration_sequences}-{most}.safetensors"


def find_candidates(
    path: Path,
    dictionary_sha256: str,
    transcoder: QKTranscoder,
    layer: AttentionLayer,
    cache: ActivationCache,
    calibration_sequences: int,
    most: int,
    threads: int,
    progress: Callable[[TokenProgress], None] | None = None,
) -> None:
    """Writes the `most` most salient pairs on the first `calibration_sequences` training sequences."""
    codes: Iterable[SequenceCodes] = SplitCodes(transcoder, layer, cache, "train", calibration_sequences)
    if progress is not None:
        tokens = passes(transcoder, layer) * calibration_sequences * cache.context
        codes = _Followed(codes, tokens, progress)
    found = salient_pairs(transcoder, layer, codes, most, threads)
    header = CandidatesHeader(
        dictionary_sha256=dictionary_sha256,
        calibration_sequences=calibration_sequences,
        shape=found.pairs.shape,
        salient=found.salient,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"numbers": found.pairs.numbers, "saliency": found.saliency}
    write_tensor_file(path, header, {name: torch.from_numpy(values) for name, values in tensors.items()})


def read_candidates(path: Path, dictionary_sha256: str, calibration_sequences: int) -> SalientPairs:
    """The pairs of this dictionary on so many sequences.

    Raises InputError when the file is damaged or another one's, UnknownFormat as `read_tensor_file`, and OSError when
    it cannot be read at all.
    """
    header, tensors = read_tensor_file(path, CandidatesHeader)
    if (header.dictionary_sha256, header.calibration_sequences) != (dictionary_sha256, calibration_sequences):
        # its numbers would name other pairs, or some that are not there
        raise InputError(
            f"{path}: holds the pairs of dictionary {header.dictionary_sha256[:16]} on {header.calibration_sequences} "
            "sequences; delete it to start over"
        )
    pairs = PairSet.from_numbers(tensors["numbers"].numpy(), header.shape)
    return SalientPairs(pairs, tensors["saliency"].numpy(), header.salient)


@dataclass(frozen=True)
class SplitCodes:
    """The codes of a split's first sequences, made one by one whenever they are gone through, and never kept."""

    transcoder: QKTranscoder
    layer: AttentionLayer
    cache: ActivationCache
    split: Literal["train", "validation"]
    sequences: int

    def __iter__(self) -> Iterator[SequenceCodes]:
        for number in range(self.sequences):
            x = self.cache.read(self.layer.geometry.layer, self.split, [number])
            yield from sequence_codes(self.transcoder, self.layer, x)


class _Followed:
    """Tells `progress` of each sequence once it was dealt with, over all the times that they are gone through."""

    def __init__(self, codes: Iterable[SequenceCodes], tokens: int, progress: Callable[[TokenProgress], None]) -> None:
        self._codes, self._tokens, self._progress = codes, tokens, progress
        self._done, self._began = 0, time.monotonic()

    def __iter__(self) -> Iterator[SequenceCodes]:
        for one in self._codes:
            yield one
            self._done += one.context
            seconds = time.monotonic() - self._began
            self._progress(TokenProgress("finding candidates", self._done, self._tokens, seconds))
