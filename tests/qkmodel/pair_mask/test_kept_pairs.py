"""Kept pairs as tensors: what is written comes back, and nothing else is taken for it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from qkmodel.pair_mask.kept_pairs import KeptPairs
from qkmodel.pair_mask.pair_set import PairSet

SHAPE = (3, 4, 5)


def kept(numbers: list[int]) -> KeptPairs:
    pairs = PairSet.from_numbers(np.array(numbers, np.int64), SHAPE)
    values = np.arange(len(numbers), dtype=np.float32)
    return KeptPairs(pairs, values / 3, np.arange(len(numbers)), -values)


@given(st.sets(st.integers(0, 59)))
def test_what_is_written_comes_back(numbers):
    one = kept(sorted(numbers))
    again = KeptPairs.from_tensors(load(save(one.to_tensors())), SHAPE)
    np.testing.assert_array_equal(again.pairs.numbers, one.pairs.numbers)
    np.testing.assert_array_equal(again.places, one.places)
    np.testing.assert_array_equal(again.mean_contribution, one.mean_contribution)
    np.testing.assert_array_equal(again.count, one.count)
    np.testing.assert_array_equal(again.variance_share, one.variance_share)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("head", torch.tensor([0, 3], dtype=torch.int16), "outside"),
        ("query_feature", torch.tensor([-1, 0], dtype=torch.int32), "outside"),
        ("key_feature", torch.tensor([0, 5], dtype=torch.int32), "outside"),
        ("head", torch.tensor([1, 0], dtype=torch.int16), "order"),
        ("count", torch.tensor([1], dtype=torch.int64), "count is"),
        ("variance_share", torch.tensor([1.0, 2.0], dtype=torch.float64), "variance_share is"),
        ("more", torch.tensor([1.0, 2.0]), "expected are"),
    ],
)
def test_forged_tensors_are_refused(name, values, message):
    tensors = kept([7, 21]).to_tensors() | {name: values}
    with pytest.raises(ValueError, match=message):
        KeptPairs.from_tensors(tensors, SHAPE)
