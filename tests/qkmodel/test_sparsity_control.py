"""A coefficient that is steered towards a wanted number of active features."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkmodel.hyperparameters import Hyperparameters
from qkmodel.sparsity_control import Coefficient


def coefficient(**given: float) -> Coefficient:
    return Coefficient(
        Hyperparameters(dictionary_size=1024, activation="relu", penalty="l1", learning_rate=1e-3, **given).query_side
    )


def test_a_given_coefficient_stays() -> None:
    one = coefficient(sparsity_coefficient=3e-3)
    one.observe(500.0, 0.1)
    assert one.value.item() == 3e-3


@settings(max_examples=30, deadline=None)
@given(target=st.floats(2, 200), scale=st.floats(1e-4, 1.0), exponent=st.floats(0.4, 1.5), lag=st.floats(0.02, 0.3))
def test_a_target_is_reached_whatever_the_slope_and_lag(
    target: float, scale: float, exponent: float, lag: float
) -> None:
    """A plant that answers λ like a training does: l0 falls as a power of λ, with a delay."""
    one, l0, steps = coefficient(target_l0=target), 500.0, 2000
    for step in range(steps):
        settled = min(512.0, 50.0 * (one.value.item() / scale) ** -exponent)
        l0 *= math.exp(lag * math.log(settled / l0))
        one.observe(l0, step / steps)
    assert l0 == pytest.approx(target, rel=0.1)


def test_the_last_tenth_keeps_the_coefficient() -> None:
    one = coefficient(target_l0=10)
    one.observe(500.0, 0.5)
    before = one.value.item()
    one.observe(500.0, 0.9)
    assert before > 1e-2 and one.value.item() == before
