"""Which keys of a sweep file opened new studies, in words."""

from pathlib import Path

import pytest

from orchestrator.config import load_sweep
from orchestrator.ledger import Ledger
from orchestrator.plan import SweepPlan, make_plan
from tests.orchestrator.sweep_files import write_sweep

TRAINING = {"tokens": 4096, "validation_sequences": 16, "cross_entropy_sequences": 2}
ANEW = "trained anew beside the earlier results, since"


def record(plan: SweepPlan) -> None:
    """The plan's studies, as a sweep that was started leaves them."""
    ledger = Ledger(plan.folder / "ledger.sqlite")
    ledger.open_sweep(plan.config.name, {}, None, {}, plan.attempt)
    for study in plan.studies:
        ledger.open_study(study.study_id, plan.config.task, study.layer, study.identity, model="m", corpus="c")
    ledger.close()


def plan_of(file: Path, **options: bool) -> SweepPlan:
    return make_plan(load_sweep(file), **options)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"layers": [1, 2, 3]}, []),
        ({"search": {"trainings": 3, "sampler": "random"}}, []),
        ({"seed": 7}, [f"layers 1, 2: {ANEW} seed is 7, not 0"]),
        ({"layers": [2], "seed": 7}, [f"layer 2: {ANEW} seed is 7, not 0"]),
        ({"training": TRAINING | {"report_tokens": 1024}}, []),
        (
            {"training": TRAINING | {"tokens": 8192, "gradient_clip": 1.0}},
            [f"layers 1, 2: {ANEW} training.tokens is 8,192, not 4,096; training.gradient_clip is 1.0, not null"],
        ),
        ({"activations": {"dtype": "float32"}}, [f"layers 1, 2: {ANEW} activations.dtype is float32, not bfloat16"]),
    ],
)
def test_the_message_names_every_key_that_changed_and_no_other(
    tmp_path: Path, change: dict, expected: list[str]
) -> None:
    record(plan_of(write_sweep(tmp_path)))
    assert plan_of(write_sweep(tmp_path, **change)).change_lines == expected


def test_content_that_changed_is_named_by_the_key_that_points_to_it(tmp_path: Path) -> None:
    file = write_sweep(tmp_path)
    record(plan_of(file))
    (tmp_path / "text" / "00.txt").write_text("Another text altogether. " * 20)
    assert plan_of(file).change_lines == [f"layers 1, 2: {ANEW} corpus: its text is another now"]


def test_a_fresh_attempt_says_so(tmp_path: Path) -> None:
    file = write_sweep(tmp_path)
    record(plan_of(file))
    assert plan_of(file, fresh=True).change_lines == [f"layers 1, 2: {ANEW} --fresh: everything is begun anew"]


def test_a_file_is_compared_with_the_study_that_is_nearest_to_it(tmp_path: Path) -> None:
    record(plan_of(write_sweep(tmp_path)))
    record(plan_of(write_sweep(tmp_path, seed=7, training=TRAINING | {"tokens": 8192})))
    lines = plan_of(write_sweep(tmp_path, seed=8, training=TRAINING | {"tokens": 8192})).change_lines
    assert lines == [f"layers 1, 2: {ANEW} seed is 8, not 7"]
