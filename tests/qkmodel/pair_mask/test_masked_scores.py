from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from qkmodel.pair_mask.masked_scores import mask_gradient, masked_scores
from qkmodel.pair_mask.pair_set import PairSet
from qkmodel.pair_mask.score_terms import SequenceCodes, sequence_codes
from qkmodel.pattern_kl import mean_kl
from qkmodel.transcoder import QKTranscoder
from tests.qkmodel.pair_mask import dense

every_family = pytest.mark.parametrize("family", dense.LAYERS)


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(2) as threads:
        yield threads


def some_pairs(transcoder: QKTranscoder, n_heads: int, share: float) -> tuple[PairSet, np.ndarray, torch.Tensor]:
    """A random choice of pairs, a mask over them, and the same mask over all pairs."""
    generator = np.random.default_rng(0)
    everything = PairSet.all(transcoder, n_heads)
    pairs = everything.subset(generator.random(len(everything)) < share)
    mask = generator.random(len(pairs))
    whole = np.zeros(len(everything))
    whole[pairs.numbers] = mask
    return pairs, mask, torch.from_numpy(whole.reshape(everything.shape))


@every_family
@pytest.mark.parametrize("activation", dense.HYPERPARAMETERS)
def test_a_full_mask_gives_the_scores_of_the_dictionary(family, activation, pool):
    transcoder, layer, x = dense.random_dictionary(family, activation)
    everything = PairSet.all(transcoder, layer.geometry.n_heads)
    q_hat, k_hat = (y.unflatten(-1, (-1, layer.geometry.d_head)) for y in transcoder(x))
    expected = layer.scores(q_hat, k_hat)
    for codes, unmasked in zip(sequence_codes(transcoder, layer, x), expected, strict=True):
        found = masked_scores(transcoder, layer, codes, everything, np.ones(len(everything)), pool)
        torch.testing.assert_close(found, unmasked, atol=1e-12, rtol=0)


@every_family
def test_a_mask_multiplies_pair_terms_and_leaves_biases(family, pool):
    transcoder, layer, x = dense.random_dictionary(family)
    pairs, mask, whole = some_pairs(transcoder, layer.geometry.n_heads, 0.4)
    codes = sequence_codes(transcoder, layer, x)[0]
    found = masked_scores(transcoder, layer, codes, pairs, mask, pool)
    torch.testing.assert_close(found, dense.scores(transcoder, layer, x[0], whole), atol=1e-12, rtol=0)


@every_family
@pytest.mark.parametrize("encoders", [False, True])
def test_loss_and_gradients_equal_autograd_through_the_dense_form(family, encoders, pool):
    transcoder, layer, x = dense.random_dictionary(family)
    pairs, mask, whole = some_pairs(transcoder, layer.geometry.n_heads, 0.5)
    batch = sequence_codes(transcoder, layer, x)
    trained = [transcoder.query.W_dec, transcoder.query.b_out, transcoder.key.W_dec, transcoder.key.b_out]
    if encoders:
        trained += [side.get_parameter(name) for side in transcoder.children() for name in ("W_enc", "b_enc")]
        # what was active before must not matter
        with torch.no_grad():
            transcoder.query.b_enc.mul_(-1)
    for parameter in trained:
        parameter.requires_grad_(True)

    whole.requires_grad_(True)
    log_p = layer.scores(*layer.project(x)).log_softmax(-1)
    log_p_hat = torch.stack([dense.scores(transcoder, layer, one, whole) for one in x]).log_softmax(-1)
    expected = mean_kl(log_p, log_p_hat)
    gradients = torch.autograd.grad(expected, [whole, *trained])

    found = mask_gradient(transcoder, layer, batch, pairs, mask, pool, x if encoders else None)
    assert found.kl == pytest.approx(expected.item(), abs=1e-12)
    np.testing.assert_allclose(found.mask, gradients[0].flatten()[pairs.numbers], atol=1e-12)
    for parameter, gradient in zip(trained, gradients[1:], strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-12, rtol=0)


def test_the_number_of_threads_changes_no_digit():
    transcoder, layer, x = dense.random_dictionary("grouped", "relu")
    transcoder, layer, x = transcoder.float(), layer.float(), x.float()
    pairs, mask, _ = some_pairs(transcoder, layer.geometry.n_heads, 0.7)
    results = []
    for threads in (1, 3):
        transcoder.requires_grad_(True).zero_grad()
        with ThreadPoolExecutor(threads) as pool:
            batch: list[SequenceCodes] = sequence_codes(transcoder, layer, x)
            found = mask_gradient(transcoder, layer, batch, pairs, mask.astype(np.float32), pool, x)
        gradients = [parameter.grad.numpy().tobytes() for parameter in transcoder.key.parameters()]
        results.append((found.kl, found.mask.tobytes(), gradients))
    assert results[0] == results[1]
