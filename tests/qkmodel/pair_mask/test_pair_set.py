import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qkmodel.pair_mask.pair_set import PairSet

SHAPE = (3, 4, 5)


@given(st.sets(st.integers(0, 59)), st.data())
def test_pairs_come_back_by_head_and_query_feature(numbers, data):
    drawn = data.draw(st.permutations(sorted(numbers)))
    pairs = PairSet.from_numbers(np.array(drawn, np.int64), SHAPE)
    expected = sorted(np.unravel_index(number, SHAPE) for number in numbers)
    found = [
        (head, feature, int(key))
        for head in range(SHAPE[0])
        for feature in range(SHAPE[1])
        for key in pairs.key_features[pairs.starts[head, feature] : pairs.starts[head, feature + 1]]
    ]
    assert found == expected
    assert pairs.numbers.tolist() == sorted(numbers)
    for head in range(SHAPE[0]):
        features = np.indices(SHAPE[1:], np.int32)
        here = {(a, b) for one, a, b in expected if one == head}
        assert {(a, b) for a, b in np.argwhere(pairs.has(head, *features))} == here
        alone = pairs.of_head(head)
        assert alone.shape == (1, *SHAPE[1:]) and len(alone) == len(here)
        assert {(a, b) for a, b in np.argwhere(alone.has(0, *features))} == here
    assert pairs.shape == SHAPE
    assert pairs.pairs_of_heads.tolist() == [sum(head == one[0] for one in expected) for head in range(SHAPE[0])]


@given(st.sets(st.integers(0, 59)), st.sets(st.integers(0, 59)))
def test_a_subset_has_the_chosen_pairs(numbers, wanted):
    pairs = PairSet.from_numbers(np.array(sorted(numbers), np.int64), SHAPE)
    chosen = np.isin(pairs.numbers, list(wanted))
    assert pairs.subset(chosen).numbers.tolist() == sorted(numbers & wanted)
