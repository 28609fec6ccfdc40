import numpy as np
import pytest
import torch

from qkmodel.pair_mask import saliency as module
from qkmodel.pair_mask.saliency import salient_pairs
from qkmodel.pair_mask.score_terms import final_scores, sequence_codes
from qkmodel.pattern_kl import row_kl
from tests.qkmodel.pair_mask import dense

ALL = 10_000


def brute_force(transcoder, layer, x) -> torch.Tensor:
    """½·Var_p of what each pair contributes behind the soft-cap, mean over heads and rows: [n_heads, query features,
    key features]."""
    total = 0
    for one, p in zip(x, layer.pattern(*layer.project(x)), strict=True):
        c = dense.contributions(transcoder, layer, one)
        if layer.geometry.soft_cap is not None:
            (true,) = layer.scores(*layer.project(one[None])).nan_to_num(neginf=0.0)
            c = c * (1 - (true / layer.geometry.soft_cap).square())[..., None, None]
        mean = torch.einsum("hij,hijab->hiab", p, c)
        square = torch.einsum("hij,hijab->hiab", p, c.square())
        total = total + (square - mean.square()).sum(1) / 2
    return total / (x.shape[0] * x.shape[1] * layer.geometry.n_heads)


def found_in_full(transcoder, layer, x, most=ALL, threads=1) -> torch.Tensor:
    found = salient_pairs(transcoder, layer, sequence_codes(transcoder, layer, x), most, threads)
    whole = np.zeros(np.prod(found.pairs.shape), np.float32)
    whole[found.pairs.numbers] = found.saliency
    return torch.from_numpy(whole.reshape(found.pairs.shape))


@pytest.mark.parametrize("family", dense.LAYERS)
@pytest.mark.parametrize("activation", dense.HYPERPARAMETERS)
def test_it_is_half_the_variance_of_the_contribution_under_the_true_pattern(family, activation):
    transcoder, layer, x = dense.random_dictionary(family, activation)
    found = found_in_full(transcoder, layer, x)
    torch.testing.assert_close(found.double(), brute_force(transcoder, layer, x), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("family", dense.LAYERS)
def test_it_is_what_leaving_out_a_weak_pair_costs_where_the_pattern_is_exact(family):
    transcoder, layer, x = dense.random_dictionary(family)
    true = layer.scores(*layer.project(x))
    cap = layer.geometry.soft_cap
    raw = true if cap is None else cap * torch.atanh(true.masked_fill(true == float("-inf"), 0.0) / cap)
    found = found_in_full(transcoder, layer, x)
    contributions = torch.stack([dense.contributions(transcoder, layer, one) for one in x])
    for pair in [(0, 1, 2), (3, 4, 0), (2, 0, 4)]:
        step = 1e-3
        without = raw.clone()
        without[:, pair[0]] -= step * contributions[:, pair[0], :, :, pair[1], pair[2]]
        without = final_scores(without, layer)
        cost = row_kl(true.log_softmax(-1), without.log_softmax(-1)).mean()
        assert cost.item() / step**2 == pytest.approx(found[pair].item(), rel=1e-2)


def test_blocks_threads_and_a_bound_change_nothing_but_how_many_are_kept(monkeypatch):
    monkeypatch.setattr(module, "SLICE", 7)
    transcoder, layer, x = dense.random_dictionary("gemma2", "relu")
    everything = found_in_full(transcoder, layer, x)
    monkeypatch.setattr(module, "BLOCK_BYTES", 2 * 4 * layer.geometry.n_heads * transcoder.key.features)
    assert torch.equal(found_in_full(transcoder, layer, x, threads=3), everything)
    some = found_in_full(transcoder, layer, x, most=10)
    assert (some > 0).sum() == 10
    assert torch.equal(some.flatten().topk(10).values, everything.flatten().topk(10).values)
    assert torch.equal(some[some > 0], everything[some > 0])
