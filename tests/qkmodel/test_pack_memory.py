"""The model of a pack's memory against the tensors that it speaks of."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkmodel.pack_memory import _pattern_bytes
from qkmodel.pattern_kl import true_pattern
from tests.qkmodel.layers import random_layer


@settings(deadline=None)
@given(
    batch=st.integers(1, 3),
    context=st.integers(3, 200),
    window=st.none() | st.integers(2, 150),
    soft_cap=st.sampled_from([None, 2.0]),
)
def test_a_true_patterns_bytes_are_those_of_its_blocks(
    batch: int, context: int, window: int | None, soft_cap: float | None
) -> None:
    layer = random_layer(window=window, soft_cap=soft_cap)
    q, k = torch.zeros(batch, context, 4, 16), torch.zeros(batch, context, 2, 16)
    blocks = true_pattern(layer, q, k, torch.float32).blocks
    # storages, since a view of nothing keeps all that it is a view of
    storages = (tensor.untyped_storage() for block in blocks for tensor in (block.log_p, block.p, block.raw))
    taken = sum(storage.nbytes() for storage in storages)
    assert taken == _pattern_bytes(layer.geometry, batch, context, "cpu")
