"""Some of all (head, query feature, key feature) pairs, held sparsely."""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64

from qkmodel.transcoder import QKTranscoder


@dataclass(frozen=True)
class PairSet:
    """Pairs in the order of (head, query feature, key feature), each once.

    Query feature a of head h has the pairs `starts[h, a]:starts[h, a + 1]`; pair n has the key feature
    `key_features[n]`. Memory: four bytes a pair, eight for each query feature of a head.
    """

    starts: Int64[np.ndarray, "n_heads query_features+1"]
    key_features: Int32[np.ndarray, "pairs"]
    key_size: int

    @classmethod
    def from_numbers(cls, numbers: Int64[np.ndarray, "pairs"], shape: tuple[int, int, int]) -> Self:
        """The pairs with these numbers, (head · query features + query feature) · key features + key feature.

        `shape` is (heads, query features, key features). Numbers may come in any order, none twice.
        """
        heads, queries, keys = shape
        rows, key_features = np.divmod(np.sort(numbers), keys)
        bounds = np.searchsorted(rows, np.arange(heads * queries + 1)).astype(np.int64)
        starts = np.concatenate([bounds[:-1].reshape(heads, queries), bounds[queries::queries, None]], axis=1)
        return cls(np.ascontiguousarray(starts), key_features.astype(np.int32), keys)

    @classmethod
    def all(cls, transcoder: QKTranscoder, n_heads: int) -> Self:
        """Every pair there is: for small dictionaries."""
        shape = (n_heads, transcoder.query.features, transcoder.key.features)
        return cls.from_numbers(np.arange(np.prod(shape, dtype=np.int64)), shape)

    def __len__(self) -> int:
        return len(self.key_features)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Heads, query features, key features."""
        return self.starts.shape[0], self.starts.shape[1] - 1, self.key_size

    @property
    def numbers(self) -> Int64[np.ndarray, "pairs"]:
        """As `from_numbers` takes them, ascending."""
        rows = np.repeat(np.arange(self.shape[0] * self.shape[1]), self.pairs_of_rows)
        return rows * self.key_size + self.key_features

    @property
    def pairs_of_rows(self) -> Int64[np.ndarray, "n_heads*query_features"]:
        """How many pairs each query feature of each head has."""
        return np.diff(self.starts, axis=1).ravel()

    @property
    def pairs_of_heads(self) -> Int64[np.ndarray, "n_heads"]:
        return self.starts[:, -1] - self.starts[:, 0]

    def has(
        self, head: int, query_features: Int[np.ndarray, "*asked"], key_features: Int[np.ndarray, "*asked"]
    ) -> Bool[np.ndarray, "*asked"]:
        """Whether each of these pairs is one of them."""
        asked = (head * self.shape[1] + np.asarray(query_features, np.int64)) * self.key_size + key_features
        return self._numbers_and_more[np.searchsorted(self._numbers_and_more, asked)] == asked

    @cached_property
    def _numbers_and_more(self) -> Int64[np.ndarray, "pairs+1"]:
        """`numbers`, and one that no pair has, so that there is a place for every number."""
        return np.append(self.numbers, np.iinfo(np.int64).max)

    def of_head(self, head: int) -> Self:
        """The pairs of one head, as those of a layer with no other."""
        first, end = self.starts[head, 0], self.starts[head, -1]
        return type(self)(self.starts[head : head + 1] - first, self.key_features[first:end], self.key_size)

    def subset(self, chosen: np.ndarray) -> Self:
        """The pairs where `chosen` [pairs] is true."""
        return type(self).from_numbers(self.numbers[chosen], self.shape)
