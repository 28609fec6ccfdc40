"""The transcoder's arithmetic, its activations, penalties and initialisation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkmodel.hyperparameters import Hyperparameters
from qkmodel.sparsity import L1Penalty, ReLU, SqrtPenalty, TanhPenalty, TopK
from qkmodel.transcoder import INITIAL_DECODER_SCALE, Transcoder, initialise_qk_transcoder
from tests.qkmodel.layers import random_layer

RELU = Hyperparameters(
    dictionary_size=50, activation="relu", penalty="l1", sparsity_coefficient=1e-3, learning_rate=1e-3, seed=3
)


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(seed=st.integers(0, 1000), features=st.integers(1, 30), data=st.data())
def test_topk_keeps_the_largest_positive(seed: int, features: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, features))
    pre = random_tensor(4, features, seed=seed)
    f = TopK(k)(pre)
    for row, kept in zip(pre.tolist(), f.tolist(), strict=True):
        threshold = sorted(row, reverse=True)[k - 1]
        assert kept == [max(value, 0.0) if value >= threshold else 0.0 for value in row]


def test_topk_passes_gradients_to_kept_features_only() -> None:
    pre = torch.tensor([[3.0, -1.0, 2.0, 1.0]], requires_grad=True)
    TopK(2)(pre).sum().backward()
    assert pre.grad.tolist() == [[1.0, 0.0, 1.0, 0.0]]


def test_penalties_by_hand() -> None:
    a = torch.tensor([[0.0, 4.0], [1.0, 0.0]], dtype=torch.float64)
    assert L1Penalty()(a, len(a), 0.0).item() == 2.5
    expected = ((4 + 1e-6) ** 0.5 + (1 + 1e-6) ** 0.5 - 2e-3) / 2
    assert SqrtPenalty()(a, len(a), 0.0).item() == pytest.approx(expected, rel=1e-12)


def test_penalties_do_not_depend_on_the_number_of_tokens() -> None:
    a = random_tensor(6, 9).abs()
    for penalty in (L1Penalty(), SqrtPenalty(), TanhPenalty()):
        torch.testing.assert_close(penalty(a, 6, 0.5), penalty(a.repeat(5, 1), 30, 0.5))


def test_sqrt_penalty_has_a_finite_slope_at_zero() -> None:
    a = torch.zeros(3, requires_grad=True)
    SqrtPenalty()(a[None], 1, 0.0).backward()
    assert torch.isfinite(a.grad).all()


def test_forward_is_the_stated_formula() -> None:
    transcoder = Transcoder(7, random_tensor(5), random_tensor(4, seed=1), ReLU())
    for index, parameter in enumerate(transcoder.parameters()):
        parameter.data = random_tensor(*parameter.shape, seed=10 + index)
    x = random_tensor(2, 3, 5, seed=2)
    by_hand = torch.empty(2, 3, 4)
    for b in range(2):
        for t in range(3):
            pre = transcoder.W_enc @ (x[b, t] - transcoder.b_pre) + transcoder.b_enc
            by_hand[b, t] = transcoder.W_dec.T @ pre.clamp(min=0) + transcoder.b_out
    torch.testing.assert_close(transcoder(x), by_hand)


def test_initial_features_write_what_the_model_writes_for_them() -> None:
    layer = random_layer(n_heads=4, n_kv_heads=2, d_model=24)
    q_mean, k_mean, mean = random_tensor(64), random_tensor(32, seed=1), random_tensor(24, seed=2)
    transcoder, scale = initialise_qk_transcoder(RELU, layer, mean, q_mean, k_mean, 1.0), INITIAL_DECODER_SCALE
    for side, weight, mean_output in ((transcoder.query, layer.w_q, q_mean), (transcoder.key, layer.w_k, k_mean)):
        torch.testing.assert_close(side.W_enc.norm(dim=-1), torch.ones(50))
        torch.testing.assert_close(side.W_dec, scale * side.W_enc @ weight.T, rtol=1e-4, atol=1e-5)
        # every encoder row lies in the row space of the projection
        projector = torch.linalg.pinv(weight) @ weight
        torch.testing.assert_close(side.W_enc @ projector.T, side.W_enc, rtol=1e-4, atol=1e-4)
        assert torch.equal(side.b_out, mean_output) and torch.equal(side.b_pre, mean)


def test_initialisation_behind_a_norm_is_its_linearisation() -> None:
    layer = random_layer(qk_norm_eps=1e-6)
    mean = random_tensor(24, seed=2)
    transcoder = initialise_qk_transcoder(RELU, layer, mean, random_tensor(64), random_tensor(32), 1.0)
    step = 1e-3
    moved = layer.double().project((mean + step * transcoder.query.W_enc).double()[None])[0].flatten(-2)
    still = layer.project(mean.double()[None, None])[0].flatten(-2)
    slope = INITIAL_DECODER_SCALE * ((moved - still) / step)[0]
    assert (slope - transcoder.query.W_dec).abs().max() <= 0.01 * slope.abs().max()


def test_seeds_move_the_initialisation_and_nothing_else_does() -> None:
    layer = random_layer()
    means = random_tensor(24), random_tensor(64), random_tensor(32)
    same = [initialise_qk_transcoder(RELU, layer, *means, 1.0).query.W_enc for _ in range(2)]
    torch.manual_seed(99)
    assert torch.equal(*same)
    assert torch.equal(same[0], initialise_qk_transcoder(RELU, layer, *means, 1.0).query.W_enc)
    other = RELU.model_copy(update={"seed": 4})
    assert not torch.equal(same[0], initialise_qk_transcoder(other, layer, *means, 1.0).query.W_enc)
