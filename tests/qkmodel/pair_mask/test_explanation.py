import numpy as np
import pytest
import torch

from qkmodel.pair_mask.explanation import explain_head
from qkmodel.pair_mask.pair_set import PairSet
from tests.qkmodel.pair_mask import dense


@pytest.mark.parametrize("family", dense.LAYERS)
def test_what_is_said_of_a_score_adds_up_to_it(family):
    transcoder, layer, x = dense.random_dictionary(family, "relu")
    contributions = dense.contributions(transcoder, layer, x[0])
    q_hat, k_hat = (y.unflatten(-1, (-1, layer.geometry.d_head))[None] for y in transcoder(x[0]))
    pattern = layer.pattern(q_hat, k_hat)[0]
    truth = layer.pattern(*layer.project(x))[0]
    for head in range(layer.geometry.n_heads):
        found = explain_head(transcoder, layer, x[0], head, keys=3, pairs=4)
        torch.testing.assert_close(found.p_hat, pattern[head])
        for look in found.looks:
            exact = contributions[head, look.query, look.key]
            sizes = sorted((abs(one.contribution) for one in look.pairs), reverse=True)
            assert [abs(one.contribution) for one in look.pairs] == sizes
            for one in look.pairs:
                expected = exact[one.query_feature, one.key_feature].item()
                assert one.contribution == pytest.approx(expected, abs=1e-12)
            assert sum(one.contribution for one in look.pairs) + look.others == pytest.approx(
                exact.sum().item(), abs=1e-12
            )
            assert look.score == pytest.approx(look.bias + exact.sum().item(), abs=1e-12)
            assert look.p == pytest.approx(truth[head, look.query, look.key].item())


def test_every_position_is_explained_by_the_keys_that_it_attends_to_most():
    transcoder, layer, x = dense.random_dictionary("mistral")
    found = explain_head(transcoder, layer, x[0], head=2, keys=2)
    for query in range(dense.CONTEXT):
        keys = [look.key for look in found.looks if look.query == query]
        assert keys == found.p[query].topk(min(2, query + 1)).indices.tolist()
    assert all(look.query - look.key < 3 for look in found.looks)


@pytest.mark.parametrize("family", dense.LAYERS)
def test_where_pairs_are_masked_only_kept_ones_count(family):
    transcoder, layer, x = dense.random_dictionary(family, "relu")
    everything = PairSet.all(transcoder, layer.geometry.n_heads)
    chosen = np.random.default_rng(0).random(len(everything)) < 0.4
    kept, mask = everything.subset(chosen), torch.from_numpy(chosen.reshape(everything.shape)).double()
    contributions = dense.contributions(transcoder, layer, x[0])
    pattern = dense.scores(transcoder, layer, x[0], mask).softmax(-1)
    for head in range(layer.geometry.n_heads):
        found = explain_head(transcoder, layer, x[0], head, keys=3, pairs=4, kept=kept)
        torch.testing.assert_close(found.p_hat, pattern[head])
        for look in found.looks:
            exact = contributions[head, look.query, look.key]
            counted = (exact * mask[head]).sum().item()
            assert all(mask[(head, *one.features)] == 1 for one in look.pairs)
            shown = sum(one.contribution for one in look.pairs)
            assert shown + look.others == pytest.approx(counted, abs=1e-12)
            assert look.score == pytest.approx(look.bias + counted, abs=1e-12)
            assert look.left_out == pytest.approx(exact.sum().item() - counted, abs=1e-12)
