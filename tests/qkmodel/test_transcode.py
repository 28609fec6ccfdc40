"""The sparse way of running a transcoder against the dense one, and what each activation keeps."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qkmodel.kernels.choice_cpu import keep_largest
from qkmodel.sparse_code import SPARSE_SHARE, CentredInputs, centred_inputs, training_code
from qkmodel.sparsity import PENALTIES, Activation, BatchTopK, ReLU, TopK
from qkmodel.transcode import infer, transcode
from qkmodel.transcoder import Transcoder

CONTEXT, D_MODEL, D_OUT = 6, 10, 7


def random_transcoder(features: int, activation: Activation, seed: int = 0) -> Transcoder:
    generator = torch.Generator().manual_seed(seed)
    transcoder = Transcoder(features, torch.randn(D_MODEL, generator=generator), torch.zeros(D_OUT), activation)
    for parameter in transcoder.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return transcoder


def inputs(batch: int, dtype: torch.dtype, seed: int = 1) -> CentredInputs:
    x = torch.randn(batch, CONTEXT, D_MODEL, generator=torch.Generator().manual_seed(seed))
    return centred_inputs(x, dtype)


def densely(transcoder: Transcoder, given: CentredInputs) -> tuple[Tensor, Tensor]:
    """(y, f) by autograd through every feature."""
    pre = torch.nn.functional.linear(given.x, transcoder.W_enc, transcoder.b_enc).unflatten(0, (-1, CONTEXT))
    f = transcoder.activation.training_forward(pre)
    return f.flatten(0, 1) @ transcoder.W_dec + transcoder.b_out, f


@pytest.mark.parametrize("activation", [TopK, BatchTopK])
@pytest.mark.parametrize("features", [48, 64, 200])
def test_sparse_equals_dense_in_values_and_gradients(activation: type, features: int) -> None:
    sparse, dense = (random_transcoder(features, activation(3)) for _ in range(2))
    given = inputs(4, torch.float32)
    side = transcode(sparse, given)
    assert side.features is not None, "the dense way was taken"
    y, f = densely(dense, given)
    torch.testing.assert_close(side.y, y, rtol=1e-4, atol=1e-4)
    assert side.active == (f[:, 1:] > 0).sum()
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (side.y * weights).sum().backward()
    (y * weights).sum().backward()
    for (name, ours), theirs in zip(sparse.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3, msg=name)
    if activation is BatchTopK:
        torch.testing.assert_close(sparse.activation.threshold, dense.activation.threshold, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("penalty", list(PENALTIES))
def test_a_sparse_relu_equals_a_dense_one_its_penalty_included(penalty: str) -> None:
    sparse, dense = (random_transcoder(64, ReLU()) for _ in range(2))
    for transcoder in (sparse, dense):
        transcoder.b_enc.data -= 6.0
    given = inputs(6, torch.float32)
    side = transcode(sparse, given)
    assert side.features is not None and 20 < len(side.features) < SPARSE_SHARE * 36 * 64
    y, f = densely(dense, given)
    torch.testing.assert_close(side.y, y, rtol=1e-4, atol=1e-4)
    assert side.active == (f[:, 1:] > 0).sum()
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    ours, theirs = PENALTIES[penalty](), PENALTIES[penalty]()
    for progress in (0.0, 0.5):
        for transcoder in (sparse, dense):
            transcoder.zero_grad()
        omega = ours(side.scaled(sparse.decoder_norms()), 36, progress)
        omega_dense = theirs(f * dense.decoder_norms(), 36, progress)
        assert omega.item() == pytest.approx(omega_dense.item(), rel=1e-4)
        ((side.y * weights).sum() + 10 * omega).backward(retain_graph=True)
        ((y * weights).sum() + 10 * omega_dense).backward(retain_graph=True)
        for (name, parameter), other in zip(sparse.named_parameters(), dense.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-3, msg=name)


def test_a_relu_of_many_active_features_is_dense() -> None:
    transcoder = random_transcoder(64, ReLU())
    side = transcode(transcoder, inputs(4, torch.float32))
    assert side.features is None and side.f.shape == (4, CONTEXT, 64)
    torch.testing.assert_close(side.y, densely(transcoder, inputs(4, torch.float32))[0])


@pytest.mark.parametrize("activation", [TopK, BatchTopK])
def test_rounded_products_choose_features_but_do_not_round_them(activation: type) -> None:
    transcoder, given = random_transcoder(64, activation(3)), inputs(8, torch.bfloat16)
    y, exact = transcode(transcoder, given).y, densely(transcoder, given)[0]
    # tokens whose choice is the same agree to float32
    same = (y - exact).abs().amax(-1) < 1e-4
    assert same.double().mean() > 0.8 and (y - exact).norm() < 0.2 * exact.norm()


def test_rounded_gradients_of_what_was_chosen_are_float64s_to_half_a_percent() -> None:
    transcoder, given = random_transcoder(64, TopK(3)), inputs(8, torch.bfloat16)
    side = transcode(transcoder, given)
    weights = torch.randn(side.y.shape, generator=torch.Generator().manual_seed(2))
    (side.y * weights).sum().backward()
    exact = random_transcoder(64, TopK(3)).double()
    code = training_code(transcoder, given)
    chosen = torch.zeros(len(given.x), 64, dtype=torch.bool)
    for token, (first, last) in enumerate(pairwise(code.starts)):
        chosen[token, code.features[first:last]] = True
    pre = torch.nn.functional.linear(given.x.double(), exact.W_enc, exact.b_enc)
    y = (torch.relu(pre) * chosen) @ exact.W_dec + exact.b_out
    (y * weights.double()).sum().backward()
    for (name, ours), theirs in zip(transcoder.named_parameters(), exact.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() < 5e-3 * theirs.grad.norm(), name


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), batch=st.integers(1, 4), k=st.integers(1, 4), features=st.integers(64, 90))
def test_batchtopk_keeps_the_largest_of_the_batch(seed: int, batch: int, k: int, features: int) -> None:
    transcoder = random_transcoder(features, BatchTopK(k), seed)
    given = inputs(batch, torch.float32, seed + 1)
    pre = torch.nn.functional.linear(given.x, transcoder.W_enc, transcoder.b_enc).unflatten(0, (-1, CONTEXT))
    counted = sorted(pre[:, 1:].flatten().tolist(), reverse=True)
    budget = k * batch * (CONTEXT - 1)
    side = transcode(transcoder, given)
    assert side.active == sum(value > 0 for value in counted[:budget])
    assert transcoder.activation.threshold.item() == pytest.approx(counted[budget - 1], rel=1e-4)


def test_batchtopks_threshold_follows_the_batches_and_decides_alone_at_the_end() -> None:
    transcoder = random_transcoder(64, BatchTopK(3))
    smallest = []
    for seed in range(3):
        before = transcoder.activation.threshold.item()
        transcode(transcoder, inputs(4, torch.float32, seed))
        smallest.append(transcoder.activation.threshold.item() - before)
    assert smallest[0] > 0 and abs(smallest[1]) < 0.1 * smallest[0]
    pre = torch.tensor([[transcoder.activation.threshold.item() * scale for scale in (0.9, 1.1, -5.0)]])
    assert (transcoder.activation(pre) > 0).tolist() == [[False, True, False]]


@pytest.mark.parametrize("features", [40, 64], ids=["dense", "sparse"])
def test_batchtopks_threshold_keeps_as_much_of_exact_values_as_rounded_ones_chose(features: int) -> None:
    given, kept, scales = inputs(1000, torch.bfloat16), 0, 8
    for scale in range(scales):
        transcoder = random_transcoder(features, BatchTopK(3))
        # so that the threshold lies now below, now above the numbers that round to it
        transcoder.W_enc.data *= 2 ** (scale / scales)
        side = transcode(transcoder, given)
        assert (side.features is None) == (features == 40)
        pre = torch.nn.functional.linear(given.x, transcoder.W_enc, transcoder.b_enc).unflatten(0, (-1, CONTEXT))
        kept += (transcoder.activation(pre)[:, 1:] > 0).sum().item()
    assert kept == pytest.approx(scales * 3 * 1000 * (CONTEXT - 1), rel=3e-3)


def test_what_batchtopk_chooses_by_is_not_differentiated() -> None:
    class Watched(BatchTopK):
        def follow(self, smallest: Tensor) -> None:
            assert not smallest.requires_grad
            super().follow(smallest)

    pre = torch.rand(2, CONTEXT, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    f = Watched(2).training_forward(pre)
    f.sum().backward()
    assert torch.equal(pre.grad, (f > 0).float())


def test_a_budget_that_is_not_used_up_keeps_everything_positive_either_way() -> None:
    sparse, dense = random_transcoder(64, BatchTopK(3)), random_transcoder(64, BatchTopK(3))
    for transcoder in (sparse, dense):
        transcoder.b_enc.data -= 9.0
    given = inputs(4, torch.float32)
    side = transcode(sparse, given)
    _, f = densely(dense, given)
    assert 0 < side.active == (f[:, 1:] > 0).sum() < 3 * 4 * (CONTEXT - 1)
    assert sparse.activation.threshold == dense.activation.threshold == 0


@pytest.mark.parametrize("activation", [TopK(3), BatchTopK(3), TopK(40)])
def test_inference_is_the_dictionary_itself(activation: Activation) -> None:
    transcoder = random_transcoder(64, activation)
    transcode(transcoder, inputs(4, torch.float32))
    x = torch.randn(2, CONTEXT, D_MODEL, generator=torch.Generator().manual_seed(5))
    y, counts = infer(transcoder, x)
    torch.testing.assert_close(y, transcoder(x).detach(), rtol=1e-4, atol=1e-4)
    assert counts.tolist() == (transcoder.encode(x)[:, 1:] > 0).sum((0, 1)).tolist()


@settings(deadline=None)
@given(
    values=st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0]), max_size=9), min_size=1, max_size=4),
    k=st.integers(1, 5),
)
def test_keeping_the_largest_of_chosen_features(values: list[list[float]], k: int) -> None:
    starts = np.cumsum([0, *map(len, values)])
    kept = np.array([value for token in values for value in token], np.float32)
    features = np.arange(len(kept), dtype=np.int32)
    first_of = starts[:-1].tolist()
    assert keep_largest(k, starts, features, kept) == starts[-1]
    for token, begin, (first, last) in zip(values, first_of, pairwise(starts), strict=True):
        # sorting keeps the order of equal ones
        largest = sorted(range(len(token)), key=lambda n: -token[n])[:k]
        expected = sorted(n for n in largest if token[n] > 0)
        assert (features[first:last] - begin).tolist() == expected
        assert kept[first:last].tolist() == [token[n] for n in expected]
