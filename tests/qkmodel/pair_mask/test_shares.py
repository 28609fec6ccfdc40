from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from qkmodel.pair_mask.pair_set import PairSet
from qkmodel.pair_mask.score_terms import score_terms, sequence_codes
from qkmodel.pair_mask.shares import PairShares, ShareSums
from tests.qkmodel.pair_mask import dense


@pytest.mark.parametrize("family", ["grouped", "mistral", "gemma2"])
def test_shares_are_covariances_with_the_score(family):
    transcoder, layer, x = dense.random_dictionary(family, "relu")
    everything = PairSet.all(transcoder, layer.geometry.n_heads)
    with ThreadPoolExecutor(2) as pool:
        sums = ShareSums(layer, everything)
        for codes in sequence_codes(transcoder, layer, x):
            terms = score_terms(transcoder, layer, codes)
            sums.add(terms, terms.scores, codes, pool)
    found = sums.shares()
    d_head, group = layer.geometry.d_head, layer.geometry.n_heads // layer.geometry.n_kv_heads
    covariance, variance, total, count, of_biases = 0, 0, 0, 0, 0
    for one in x:
        p = layer.pattern(*layer.project(one[None]))[0]
        c = dense.contributions(transcoder, layer, one)
        q_hat, k_hat = (y.unflatten(-1, (-1, d_head))[None] for y in transcoder(one))
        keys = layer.rotate(k_hat).repeat_interleave(group, 2)
        s = torch.einsum("xihd,xjhd->hij", layer.rotate(q_hat), keys) * layer.geometry.scale
        centred = s - (p * s).sum(-1, keepdim=True)
        covariance = covariance + torch.einsum("hij,hijab->hab", p * centred, c)
        variance = variance + (p * centred.square()).sum((1, 2))
        # what no pair is, on its own
        of_biases = of_biases + (p * centred * (s - c.sum((-1, -2)))).sum((1, 2))
        active = (c != 0) & layer.visible(len(one))[:, :, None, None]
        total = total + (c * active).sum((1, 2))
        count = count + active.sum((1, 2))
    np.testing.assert_allclose(found.variance_share, (covariance / variance[:, None, None]).flatten(), atol=1e-12)
    np.testing.assert_allclose(found.bias_share, of_biases / variance, atol=1e-12)
    np.testing.assert_allclose(found.variance_share.reshape(len(variance), -1).sum(1) + found.bias_share, 1, atol=1e-12)
    np.testing.assert_array_equal(found.count, count.flatten())
    np.testing.assert_allclose(found.mean_contribution, (total / count.clamp(min=1)).flatten(), atol=1e-12)


@pytest.mark.parametrize(("share", "pairs"), [(0.5, 1), (0.76, 1), (0.78, 2), (1.0, 2)])
def test_the_fewest_pairs_that_explain_a_share_of_what_all_explain(share, pairs):
    shares = np.array([0.2, -0.1, 0.5, 0.05])
    assert PairShares(shares, shares, shares, shares).pairs_for(share) == pairs
    for nothing in (shares[:0], shares - 1):
        assert PairShares(nothing, nothing, nothing, nothing).pairs_for(share) is None
