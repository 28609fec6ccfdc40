"""Which features a CPU chooses, and the gradients of what was chosen, against NumPy's sorting and float64."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkmodel.kernels import choice_cpu, int8_cpu, sparse_cpu
from qkmodel.products import multiplies_int8
from qkmodel.sparse_code import centred_inputs, training_code
from qkmodel.sparsity import TopK
from qkmodel.transcoder import Transcoder


def largest(row: np.ndarray, k: int) -> list[int]:
    """The k largest positive elements, the first of equal ones."""
    # a stable sort keeps equal ones in their order
    return sorted(j for j in np.argsort(-row, kind="stable")[:k].tolist() if row[j] > 0)


def chosen(starts: np.ndarray, features: np.ndarray) -> list[list[int]]:
    return [features[first:last].tolist() for first, last in pairwise(starts)]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    width=st.integers(1, 300),
    k=st.integers(1, 40),
    kind=st.sampled_from(["normal", "ties", "few positive", "none positive", "one group", "extreme"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_largest_of_each_token_are_chosen(seed: int, width: int, k: int, kind: str, dtype: torch.dtype) -> None:
    pre = torch.randn(5, width, generator=torch.Generator().manual_seed(seed))
    pre = {
        "normal": pre,
        "ties": (pre * 2).round(),
        "few positive": pre - 2,
        "none positive": -pre.abs(),
        # all that are large lie where one maximum stands for them
        "one group": pre + 9.0 * (torch.arange(width) % 64 == 3),
        "extreme": torch.where(pre > 1, torch.inf, pre * 1e30),
    }[kind].to(dtype)
    bits = pre.view(torch.int16 if dtype == torch.bfloat16 else torch.int32).numpy()
    starts, features = np.empty(6, np.int64), np.empty(5 * k, np.int32)
    choice_cpu.choose_largest(bits, k, starts, features)
    assert chosen(starts, features) == [largest(row, k) for row in pre.float().numpy()]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), width=st.integers(1, 200), k=st.integers(1, 20))
def test_products_choose_as_the_pre_activations_that_they_stand_for(seed: int, width: int, k: int) -> None:
    random = np.random.default_rng(seed)
    products = random.integers(-(2**22), 2**22, (5, width), dtype=np.int32)
    x_scales, w_scales, bias = (random.random(size).astype(np.float32) / 999 for size in (5, width, width))
    starts, features = np.empty(6, np.int64), np.empty(5 * k, np.int32)
    choice_cpu.choose_largest_of_products(products, x_scales, w_scales, bias, k, starts, features)
    pre = products * (x_scales[:, None].astype(np.float64) * w_scales) + bias
    for row, features_of_row in zip(pre, chosen(starts, features), strict=True):
        assert len(features_of_row) == min(k, (row > 0).sum())
        kept = np.isin(np.arange(width), features_of_row)
        # bfloat16 has eight bits: what is left out is no larger than what is kept, but for the last of them
        assert row[~kept].max(initial=0.0) <= row[kept].min(initial=np.inf) * (1 + 2**-7)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), width=st.integers(2, 130), scale=st.sampled_from([1e-20, 1.0, 1e20]))
def test_rows_are_rounded_to_half_a_step_and_multiplied_exactly(seed: int, width: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (scale * torch.randn(rows, width, generator=generator) for rows in (3, 4))
    a[1] = 0.0
    rounded_a, rounded_b = int8_cpu.round_rows(a), int8_cpu.round_rows(b)
    assert rounded_a.numbers[1].tolist() == [0] * width and rounded_a.scales[1] == 0
    for row, rounded, step in zip(a, rounded_a.numbers, rounded_a.scales, strict=True):
        assert (row.double() - rounded.double() * float(step)).abs().max() <= 0.5001 * step
        assert step == 0 or rounded.abs().max() == 127
    if multiplies_int8(torch.bfloat16, a.device):
        exact = rounded_a.numbers.long() @ rounded_b.numbers.long().mT
        assert torch.equal(int8_cpu.products(rounded_a, rounded_b).long(), exact)


@pytest.mark.skipif(not multiplies_int8(torch.bfloat16, torch.device("cpu")), reason="this CPU has no products in int8")
@pytest.mark.parametrize("k", [1, 3, 16])
def test_products_in_int8_and_exact_values_choose_nearly_what_exact_values_alone_choose(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    transcoder = Transcoder(512, torch.zeros(96), torch.zeros(8), TopK(k))
    transcoder.W_enc.data = torch.randn(512, 96, generator=generator)
    x = torch.randn(8, 64, 96, generator=generator)
    # as in a language model: a few dimensions are much larger than all others
    x[..., :2] *= 8
    given = centred_inputs(x, torch.bfloat16)
    assert given.int8 is not None
    code = training_code(transcoder, given)
    pre = given.x.double() @ transcoder.W_enc.double().mT + transcoder.b_enc.double()
    wrong = 0
    for token, (first, last) in enumerate(pairwise(code.starts)):
        features = code.features[first:last]
        wrong += len(set(largest(pre[token].numpy(force=True), k)) - set(features.tolist()))
        values = pre[token, features.astype(np.int64)].detach()
        torch.testing.assert_close(torch.from_numpy(code.values[first:last]).double(), values, rtol=1e-4, atol=1e-4)
    assert wrong <= 0.004 * k * len(x.flatten(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_own", [False, True])
def test_gradients_equal_those_of_float64_for_any_number_of_tokens_to_a_feature(
    dtype: torch.dtype, has_own: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    tokens, features = 12, len(counts)
    active = torch.stack([torch.arange(tokens) < count for count in counts], 1)
    active = active[torch.randperm(tokens, generator=generator)]
    x, dy = (torch.randn(tokens, width, generator=generator).to(dtype) for width in (9, 21))
    w_dec = torch.randn(features, 21, generator=generator)
    token, feature = active.nonzero(as_tuple=True)
    values, own = (torch.randn(len(token), generator=generator) for _ in range(2))
    # a chosen feature whose exact value is not positive has no gradient
    values = values.clamp(min=0.0)
    starts = np.concatenate([[0], active.sum(1).cumsum(0).numpy()])
    found = [np.full((features, 9), np.nan, np.float32), np.full(features, np.nan, np.float32)]
    found.append(np.full((features, 21), np.nan, np.float32))
    given_x, given_dy = (t.view(torch.int16).numpy() if dtype == torch.bfloat16 else t.numpy() for t in (x, dy))
    d_values = own.numpy() if has_own else own.numpy()[:0]
    code = (starts, feature.int().numpy(), values.numpy())
    sparse_cpu.gradients(given_x, *code, w_dec.numpy(), given_dy, d_values, *found)
    f, df = (torch.zeros(tokens, features, dtype=torch.float64) for _ in range(2))
    f[token, feature] = values.double()
    df[token, feature] = own.double() if has_own else 0.0
    df = torch.where(f > 0, df + dy.double() @ w_dec.double().mT, 0.0)
    for ours, exact in zip(found, (df.mT @ x.double(), df.sum(0), f.mT @ dy.double()), strict=True):
        torch.testing.assert_close(torch.from_numpy(ours).double(), exact, rtol=1e-5, atol=1e-5)
