"""Rules against brute force over whole fronts; what they are called; what is refused."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.choice import RecoveredRule, SizeRule, apply_rule, parse_rule
from orchestrator.ledger import Ledger, Training
from orchestrator.pareto import front_trainings
from orchestrator.status import StudyStatus, study_statuses
from qkmodel.errors import InputError

# few distinct values, so that ties are frequent
points = st.lists(st.tuples(st.integers(1, 30).map(float), st.integers(1, 16).map(lambda n: n / 16)), max_size=10)


def training(number: int, l0: float, kl: float) -> Training:
    """Finished, with a baseline KL of 2 and all that no rule asks for left None."""
    values = dict.fromkeys(Training.__dataclass_fields__) | {
        "training_id": f"{number:016x}",
        "study_id": "study",
        "layer": 8,
        "number": number,
        "state": "finished",
        "hyperparameters": {"dictionary_size": 512},
        "metrics": {"l0": l0, "kl": kl, "kl_recovered": 1 - kl / 2},
        "constraints": {},
    }
    return Training(**values)


def front_of(found: list[tuple[float, float]]) -> list[Training]:
    return front_trainings([training(number, *point) for number, point in enumerate(found)])


@given(points, st.integers(10, 320).map(lambda n: n / 10))
def test_at_most_so_many_active_features_equals_brute_force(found: list[tuple[float, float]], l0: float) -> None:
    front = front_of(found)
    picked = parse_rule(f"l0={l0:g}").pick(front)
    allowed = [one for one in front if round(one.metrics["l0"] * 100) <= round(l0 * 110)]
    if picked is None:
        assert allowed == []
    else:
        assert picked in allowed
        assert all(picked.metrics["kl"] <= one.metrics["kl"] for one in allowed)


@given(points, st.integers(500, 1000).map(lambda n: n / 1000))
def test_at_least_so_much_recovered_equals_brute_force(found: list[tuple[float, float]], share: float) -> None:
    front = front_of(found)
    picked = parse_rule(f"kl_recovered>={share:g}").pick(front)
    allowed = [one for one in front if one.metrics["kl_recovered"] >= share]
    if picked is None:
        assert allowed == []
    else:
        assert picked in allowed
        assert all(picked.metrics["l0"] <= one.metrics["l0"] for one in allowed)


@given(points)
def test_the_knee_is_on_the_front_and_of_two_the_better_one(found: list[tuple[float, float]]) -> None:
    front = front_of(found)
    picked = parse_rule("knee").pick(front)
    assert (picked is None) == (front == [])
    if 0 < len(front) <= 2:
        assert picked.metrics["kl"] == min(one.metrics["kl"] for one in front)
    assert picked is None or picked in front


@pytest.mark.parametrize(
    ("text", "slug"),
    [
        ("knee", "knee"),
        ("l0=16", "l0-16"),
        ("l0=16.0", "l0-16"),
        ("l0 = 16.5", "l0-16_5"),
        ("l0=1000000", "l0-1000000"),
        ("kl_recovered>=0.95", "recovered-95"),
        ("kl_recovered >= 0.955", "recovered-95_5"),
        ("kl_recovered>=0.29", "recovered-29"),
        ("kl_recovered>=1", "recovered-100"),
    ],
)
def test_slugs(text: str, slug: str) -> None:
    assert parse_rule(text).slug == slug


@given(st.one_of(st.integers(1, 10**5).map(lambda n: n / 100 + 1), st.integers(1, 10**5).map(float)))
def test_slugs_are_aliases_and_tell_numbers_apart(value: float) -> None:
    rules = [f"l0={value:g}", f"l0={value + 1:g}"]
    slugs = [parse_rule(rule).slug for rule in rules]
    assert all(re.fullmatch(r"[\w-]+", slug, re.ASCII) for slug in slugs)
    assert slugs[0] != slugs[1] or rules[0] == rules[1]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "kne",
            "knee\n!",
            "l0",
            "l0=",
            "l0=-1",
            "l0=0.5",
            "l0=\n0.5",
            "l0=1e3",
            "l0=nan",
            "l0<=16",
            "l0=16;x",
            "l0=٣",
        ),
        *("kl_recovered>=0", "kl_recovered>=1.01", "kl_recovered>=95", "kl_recovered=0.9"),
        *("training=", "training=a/b", "training=a'b"),
    ],
)
def test_what_is_no_rule_is_one_line(text: str) -> None:
    with pytest.raises(InputError, match="--rule") as refused:
        parse_rule(text)
    assert "\n" not in str(refused.value)


@pytest.fixture
def statuses(tmp_path: Path) -> list[StudyStatus]:
    """Layers 4 and 8 of the present file, and a former study of layer 8."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for study, layer in (("four", 4), ("former", 8), ("eight", 8)):
        ledger.open_study(study, "transcoder", layer, {}, model="m", corpus="c")
        ledger.set_reference(study, {"kl_baseline": 2.0, "l0_cap": 128.0})
    finish(ledger, "four", "4a00", 20.0, 0.3)
    finish(ledger, "former", "8a00", 8.0, 0.01)
    for training_id, l0, kl in (("8b00", 8.0, 0.5), ("8b01", 16.0, 0.2), ("8c00", 90.0, 0.15), ("8d00", 91.0, 0.9)):
        finish(ledger, "eight", training_id, l0, kl)
    ledger.add_training("eight", "8e00", {"dictionary_size": 512}, 1000)
    ledger.set_current({"four": 1000, "eight": 5000})
    return study_statuses(ledger)


def finish(ledger: Ledger, study: str, training_id: str, l0: float, kl: float) -> None:
    ledger.add_training(study, training_id, {"dictionary_size": 512}, 1000)
    ledger.finish(training_id, {"l0": l0, "kl": kl, "kl_recovered": 1 - kl / 2}, "d", "aa")


def picked(statuses: list[StudyStatus], rule: str, layer: int | None = None) -> list[tuple[str, str]]:
    return [(one.training.training_id, one.alias) for one in apply_rule(statuses, parse_rule(rule), layer)]


def test_every_layer_of_the_present_file_unless_one_is_named(statuses: list[StudyStatus]) -> None:
    assert picked(statuses, "knee") == [("4a00", "knee"), ("8b01", "knee")]
    assert picked(statuses, "knee", 8) == [("8b01", "knee")]
    assert picked(statuses, "l0=8", 8) == [("8b00", "l0-8")]
    assert picked(statuses, "kl_recovered>=0.92", 8) == [("8c00", "recovered-92")]


def test_a_training_is_taken_by_its_id_on_a_front_or_not(statuses: list[StudyStatus]) -> None:
    assert picked(statuses, "training=8d00") == [("8d00", "training-8d00")]
    assert picked(statuses, "training=8a", 8) == [("8a00", "training-8a00")]


@pytest.mark.parametrize(
    ("rule", "layer", "words"),
    [
        (
            "l0=16",
            None,
            r"^layer 4: no training on the front has l0 ≤ 17\.6; it offers l0 20 to 20 and kl_recovered 0\.85",
        ),
        ("kl_recovered>=0.99", 8, r"has kl_recovered ≥ 0\.99; it offers l0 8 to 90 and kl_recovered 0\.75 to 0\.925$"),
        ("knee", 5, r"^--layer: .* it has 4, 8$"),
        ("training=8b", None, "2 trainings begin with 8b"),
        ("training=99", None, "the sweep has no training 99"),
        ("training=8e00", None, "8e00 is open; only finished ones"),
        ("training=8b01", 4, "8b01 is of layer 8, not 4"),
    ],
)
def test_what_cannot_be_chosen_is_one_line(
    statuses: list[StudyStatus], rule: str, layer: int | None, words: str
) -> None:
    with pytest.raises(InputError, match=words) as refused:
        apply_rule(statuses, parse_rule(rule), layer)
    assert "\n" not in str(refused.value)


def test_an_empty_front_is_said(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.open_study("four", "transcoder", 4, {}, model="m", corpus="c")
    ledger.set_current({"four": 1000})
    with pytest.raises(InputError, match="layer 4: the front is empty"):
        apply_rule(study_statuses(ledger), parse_rule("knee"))


def test_the_bound_itself_is_met() -> None:
    front = front_of([(17.6, 0.1), (17.7, 0.05)])
    assert SizeRule("l0", parse_rule("l0=16").most).pick(front).metrics["l0"] == 17.6
    exact = front_of([(8.0, 0.1)])
    assert RecoveredRule("kl_recovered", parse_rule("kl_recovered>=0.95").share).pick(exact) is exact[0]
