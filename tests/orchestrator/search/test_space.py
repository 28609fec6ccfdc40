import itertools
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from orchestrator.search.space import (
    Alternative,
    Range,
    contains,
    dimensions,
    enumerate_space,
    grid,
    grid_size,
    is_numeric,
)
from orchestrator.search.space_checks import validate_space
from qkmodel.errors import InputError
from qkmodel.hyperparameters import Hyperparameters

PARSE = TypeAdapter(Alternative).validate_python

RELU = {
    "dictionary_size": [512, 1024],
    "activation": "relu",
    "penalty": "l1",
    "sparsity_coefficient": {"low": 1e-3, "high": 3e-2, "log": True, "points": 4},
    "learning_rate": 3e-3,
}
MASK = {"pair_cost": [1e-7, 1e-6]}
TOPK = {"dictionary_size": 512, "activation": "topk", "k": [8, 16], "learning_rate": 1e-3}


def without(alternative, name):
    return {key: setting for key, setting in alternative.items() if key != name}


def test_parsing_keeps_types_apart():
    parsed = PARSE({"k": 1, "learning_rate": 1.0, "activation": "1", "seed": [0, 1]})
    assert [type(value) for value in parsed.values()] == [int, float, str, list]
    assert PARSE({"k": {"low": 1, "high": 2}})["k"] == Range(low=1, high=2)


@pytest.mark.parametrize(
    "setting",
    [
        None,
        [None],
        [[1]],
        math.nan,
        [math.inf],
        {"low": 1},
        {"low": 1, "high": 2, "step": 1},
        {"low": "1", "high": 2},
        {"low": True, "high": 2},
        {"low": 1, "high": math.inf},
    ],
)
def test_parsing_refuses(setting):
    with pytest.raises(ValidationError):
        PARSE({"k": setting})


# what is wrong: (alternatives, sampler, trainings, pieces that the message has to hold)
BROKEN = {
    "no alternative": ([], "auto", 9, ["search.space:", "empty"]),
    "empty alternative": ([{}], "auto", 9, ["search.space:", "empty"]),
    "unknown name": (
        [RELU | {"learning_rat": 1}],
        "auto",
        9,
        ["search.space.learning_rat:", "learning_rate?"],
    ),
    "unknown name, nothing near": (
        [RELU | {"zzz": 1}],
        "auto",
        9,
        ["search.space.zzz:", "dictionary_size, "],
    ),
    "empty list": ([RELU | {"learning_rate": []}], "auto", 9, ["search.space.learning_rate:", "empty"]),
    "twice in a list": ([RELU | {"dictionary_size": [512, 512.0]}], "auto", 9, ["dictionary_size:", "512.0"]),
    "low above high": (
        [RELU | {"learning_rate": {"low": 2e-3, "high": 1e-3}}],
        "auto",
        9,
        ["search.space.learning_rate:", "0.002", "0.001"],
    ),
    "low equal to high": ([TOPK | {"k": {"low": 8, "high": 8}}], "auto", 9, ["search.space.k:", "8"]),
    "log from zero": (
        [RELU | {"sparsity_coefficient": {"low": 0, "high": 1, "log": True}}],
        "auto",
        9,
        ["search.space.sparsity_coefficient:", "low 0", "above 0"],
    ),
    "negative coefficient": (
        [RELU | {"sparsity_coefficient": [0.1, -0.1]}],
        "auto",
        9,
        ["search.space.sparsity_coefficient:", "-0.1", "greater than or equal to 0"],
    ),
    "learning rate zero": (
        [TOPK | {"learning_rate": 0}],
        "auto",
        9,
        ["search.space.learning_rate:", "than 0"],
    ),
    "one point": ([TOPK | {"k": {"low": 1, "high": 8, "points": 1}}], "grid", 9, ["space.k:", "points 1"]),
    "grid without points": (
        [TOPK | {"k": {"low": 1, "high": 8}}],
        "grid",
        9,
        ["search.space.k:", "points: 4"],
    ),
    "range of words": (
        [RELU | {"penalty": {"low": 1, "high": 8}}],
        "auto",
        9,
        ["space.penalty:", "l1, sqrt"],
    ),
    "unknown word": ([TOPK | {"activation": "topkk"}], "auto", 9, ["activation:", "'topkk'", "topk?"]),
    "number for a word": ([RELU | {"penalty": 3}], "auto", 9, ["search.space.penalty:", "3", "l1, sqrt"]),
    "word for a number": ([TOPK | {"k": "8"}], "auto", 9, ["search.space.k:", "'8'", "whole number"]),
    "true for a number": ([TOPK | {"k": [1, True]}], "auto", 9, ["search.space.k: true is neither a number"]),
    "true for a word": ([TOPK | {"activation": True}], "auto", 9, ["activation:", "True", "known: relu, topk"]),
    "mask without a cost": ([{"form": "sqrt"}], "auto", 9, ["search.space:", "pair_cost is missing"]),
    "near what is not written": ([MASK | {"dictionry": 8}], "auto", 9, ["unknown hyperparameter", "known: form,"]),
    "mask with a size": ([MASK | {"k": 8}], "auto", 9, ["search.space.k:", "unknown hyperparameter", "known: "]),
    "number for a switch": ([MASK | {"joint": 1}], "auto", 9, ["search.space.joint:", "neither true nor false"]),
    "range of a switch": ([MASK | {"joint": {"low": 0, "high": 1}}], "auto", 9, ["joint:", "one of true, false"]),
    "mask without candidates": ([MASK | {"pair_cost": [1e-7, 0]}], "auto", 9, ["pair_cost:", "greater than 0"]),
    "grid of masks": ([MASK | {"joint": [True, False]}], "grid", 3, ["4 points", "raise it to 4"]),
    "dictionary in the space": ([MASK | {"dictionary": "a"}], "auto", 9, ["dictionary:", "pair_mask.dictionaries"]),
    "broken number": ([TOPK | {"k": [8, 8.5]}], "auto", 9, ["search.space.k:", "8.5", "whole number"]),
    "broken bound": ([TOPK | {"k": {"low": 0.5, "high": 8}}], "auto", 9, ["search.space.k:", "0.5", "whole"]),
    "k too large in a list": ([TOPK | {"k": [8, 600, 16]}], "auto", 9, ["search.space:", "k 600", "512"]),
    "k too large in a range": (
        [TOPK | {"k": {"low": 8, "high": 300}, "dictionary_size": {"low": 256, "high": 512}}],
        "auto",
        9,
        ["search.space:", "k 300", "256"],
    ),
    "topk without k": ([without(TOPK, "k")], "auto", 9, ["search.space:", "topk needs k"]),
    "relu without penalty": ([without(RELU, "penalty")], "auto", 9, ["search.space:", "relu needs penalty"]),
    "no learning rate": ([without(TOPK, "learning_rate")], "auto", 9, ["learning_rate is missing"]),
    "both activations": (
        [RELU | {"activation": ["relu", "topk"]}],
        "auto",
        9,
        ["search.space:", "alternative"],
    ),
    "the second alternative": ([RELU, TOPK | {"k": 0}], "auto", 9, ["search.space[1].k:", "0", "equal to 1"]),
    "the same alternative": (
        [TOPK, TOPK | {"k": [16, 8], "seed": 0}],
        "auto",
        9,
        ["search.space[1]:", "search.space[0]"],
    ),
    "grid too large": ([RELU, TOPK], "grid", 9, ["10 points", "search.trainings is 9", "raise it to 10"]),
    "gp with alternatives": ([RELU, TOPK], "gp", 9, ["search.sampler:", "gp", "tpe"]),
    "nsga2 with alternatives": ([RELU, TOPK], "nsga2", 9, ["search.sampler:", "nsga2", "tpe"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_spaces_are_refused_with_one_line(case):
    alternatives, sampler, trainings, pieces = BROKEN[case]
    with pytest.raises(InputError) as refused:
        validate_space([PARSE(alternative) for alternative in alternatives], sampler, trainings)
    message = str(refused.value)
    assert "\n" not in message
    for piece in pieces:
        assert piece in message


def test_good_spaces_pass():
    validate_space([PARSE(RELU)], "grid", 8)
    validate_space([PARSE(RELU), PARSE(TOPK)], "grid", 10)
    validate_space([PARSE(RELU), PARSE(TOPK)], "tpe", 1)
    validate_space([PARSE(RELU | {"sparsity_coefficient": {"low": 0, "high": 1}})], "gp", 20)


def test_a_huge_grid_is_counted_without_being_listed():
    alternative = PARSE(RELU | {"seed": list(range(10_000)), "learning_rate": [i / 1e4 for i in range(1, 1001)]})
    with pytest.raises(InputError, match="80000000 points"):
        validate_space([alternative], "grid", 8)


def test_grid_equals_nested_loops():
    coefficients = [1e-3, 0.00310723, 0.00965489, 3e-2]
    expected = [
        {
            "dictionary_size": size,
            "activation": "relu",
            "penalty": "l1",
            "sparsity_coefficient": coefficient,
            "learning_rate": 3e-3,
            "seed": 0,
        }
        for size, coefficient in itertools.product([512, 1024], coefficients)
    ]
    assert grid([PARSE(RELU)]) == expected
    assert grid([PARSE(dict(reversed(RELU.items())))]) == expected


def test_grid_lists_the_points_of_overlapping_alternatives_once():
    alternatives = [PARSE(TOPK), PARSE(TOPK | {"k": [16, 32], "seed": 0})]
    assert [point["k"] for point in grid(alternatives)] == [8, 16, 32]
    assert grid_size(alternatives) == 3


def test_grid_rounds_whole_numbers_and_drops_repetitions():
    log = PARSE(TOPK | {"k": {"low": 1, "high": 8, "log": True, "points": 6}})
    assert [point["k"] for point in grid([log])] == [1, 2, 3, 5, 8]


@given(
    low=st.floats(1e-6, 1.0),
    factor=st.floats(1.001, 1e4),
    points=st.integers(2, 12),
    log=st.booleans(),
)
def test_grid_of_a_range_is_evenly_spaced(low, factor, points, log):
    setting = Range(low=low, high=low * factor, log=log, points=points)
    rates = [point["learning_rate"] for point in grid([PARSE(TOPK | {"k": 8}) | {"learning_rate": setting}])]
    assert rates[0] == setting.low and rates[-1] == setting.high
    assert rates == sorted(set(rates))
    for index, rate in enumerate(rates) if len(rates) == points else ():
        share = index / (points - 1)
        exact = low * factor**share if log else low + (setting.high - low) * share
        assert rate == pytest.approx(exact, rel=1e-5)


def test_enumeration_holds_every_whole_number():
    alternative = PARSE(TOPK | {"k": {"low": 3, "high": 6}, "seed": [0, 1]})
    assert [(point["k"], point["seed"]) for point in enumerate_space([alternative])] == list(
        itertools.product([3, 4, 5, 6], [0, 1])
    )
    assert enumerate_space([PARSE(RELU)]) is None


def test_dimensions_are_what_varies():
    assert dimensions(PARSE(RELU | {"seed": [3]})) == ("dictionary_size", "sparsity_coefficient")
    assert not is_numeric(PARSE(RELU))
    assert is_numeric(PARSE(RELU | {"dictionary_size": [512]}))


def test_contains_agrees_with_the_grid():
    relu, topk = PARSE(RELU), PARSE(TOPK)
    assert all(contains(relu, point) and not contains(topk, point) for point in grid([relu]))
    point = grid([topk])[0]
    assert not contains(topk, point | {"k": 9})
    assert not contains(topk, point | {"seed": 1})
    assert Hyperparameters(**point).seed == 0


def test_importing_the_space_is_light():
    code = "import sys, orchestrator.search.space; print({'optuna', 'torch', 'ray'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"
