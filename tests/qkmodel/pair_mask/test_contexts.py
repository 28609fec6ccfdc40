"""The contexts of a pair against a search through every position of every sequence."""

import pytest
import torch

from qkmodel.pair_mask.contexts import top_contexts
from tests.qkmodel.pair_mask import dense


@pytest.mark.parametrize("family", ["grouped", "mistral"])
def test_they_are_where_the_pair_is_most_active(family):
    transcoder, layer, _ = dense.random_dictionary(family, "relu")
    window = layer.geometry.window or dense.CONTEXT
    x = torch.randn(9, dense.CONTEXT, layer.geometry.d_model, dtype=torch.float64)
    pairs = [(a, b) for a in range(dense.QUERY_FEATURES) for b in range(dense.KEY_FEATURES)]
    found = top_contexts(transcoder, layer, enumerate(x), pairs, count=3)
    f_query, f_key = transcoder.query.encode(x), transcoder.key.encode(x)
    for (a, b), contexts in found.items():
        expected = []
        for sequence in range(len(x)):
            meetings = [
                (f_query[sequence, i, a] * f_key[sequence, j, b]).item()
                for i in range(dense.CONTEXT)
                for j in range(max(0, i - window + 1), i + 1)
            ]
            if max(meetings) > 0:
                expected.append((-max(meetings), sequence))
        assert [(-one.strength, one.sequence) for one in contexts] == sorted(expected)[:3]
        for one in contexts:
            assert 0 <= one.query - one.key < window
            assert torch.equal(one.query_activations, f_query[one.sequence, :, a])
    assert any(len(contexts) == 3 for contexts in found.values())


def test_a_pair_that_is_never_active_has_none():
    transcoder, layer, x = dense.random_dictionary("grouped", "relu")
    with torch.no_grad():
        transcoder.query.b_enc[2] = -1e9
    assert top_contexts(transcoder, layer, enumerate(x), [(2, 0)], count=3) == {(2, 0): []}
