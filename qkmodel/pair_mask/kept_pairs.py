"""The pairs that a mask kept, as a dictionary's folder holds them."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from qkmodel.pair_mask.pair_set import PairSet
from qkmodel.pair_mask.shares import PairShares

# tensor name -> element type
TENSORS = {
    "head": torch.int16,
    "query_feature": torch.int32,
    "key_feature": torch.int32,
    "mean_contribution": torch.float32,
    "count": torch.int64,
    "variance_share": torch.float32,
}


@dataclass(frozen=True)
class KeptPairs:
    """The pairs, and what each of them does on the validation sequences; see `PairShares`."""

    pairs: PairSet
    mean_contribution: Float32[np.ndarray, "pairs"]
    count: Int64[np.ndarray, "pairs"]
    variance_share: Float32[np.ndarray, "pairs"]

    @classmethod
    def of(cls, pairs: PairSet, shares: PairShares) -> Self:
        numbers = (shares.mean_contribution.astype(np.float32), shares.count, shares.variance_share.astype(np.float32))
        return cls(pairs, *numbers)

    @property
    def places(self) -> Int64[np.ndarray, "3 pairs"]:
        """Head, query feature and key feature of each pair."""
        return np.stack(np.unravel_index(self.pairs.numbers, self.pairs.shape))

    def to_tensors(self) -> dict[str, Tensor]:
        """Every tensor [pairs], in the order of head, query feature, key feature."""
        columns = (*self.places, self.mean_contribution, self.count, self.variance_share)
        return {
            name: torch.from_numpy(np.ascontiguousarray(column)).to(dtype)
            for (name, dtype), column in zip(TENSORS.items(), columns, strict=True)
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], shape: tuple[int, int, int]) -> Self:
        """The inverse for (heads, query features, key features).

        Raises ValueError for what `to_tensors` does not give: another tensor, type or length, a pair that the
        dictionary does not have, pairs twice or in another order.
        """
        if tensors.keys() != TENSORS.keys():
            raise ValueError(f"holds the tensors {', '.join(sorted(tensors))}; expected are {', '.join(TENSORS)}")
        count = tensors["head"].shape
        for name, dtype in TENSORS.items():
            if tensors[name].dtype != dtype or tensors[name].shape != count or len(count) != 1:
                raise ValueError(f"tensor {name} is {tensors[name].dtype} {tuple(tensors[name].shape)}")
        places = [tensors[name].numpy().astype(np.int64) for name in ("head", "query_feature", "key_feature")]
        if any(
            len(place) and not 0 <= place.min() <= place.max() < end for place, end in zip(places, shape, strict=True)
        ):
            raise ValueError(f"names a pair outside (heads, query features, key features) = {shape}")
        numbers = np.ravel_multi_index(places, shape)
        if (np.diff(numbers) <= 0).any():
            raise ValueError("pairs are not in the order of head, query feature, key feature, each once")
        rest = (tensors[name].numpy() for name in ("mean_contribution", "count", "variance_share"))
        return cls(PairSet.from_numbers(numbers, shape), *rest)
