"""A sweep whose activations take more than `activations.max_bytes`: packs compute those that they train on."""

import os
import signal
from pathlib import Path

import pytest

from qkmodel.dictionary import TRANSCODER_FILE
from tests.system.test_first_sweep import Sweep, wait_until_training

pytestmark = pytest.mark.system

# six shards of training sequences, four of which are cached for the means
TOKENS = 384 * 128
LIMIT = "activations.max_bytes=60MB"


def dictionaries(sweep: Sweep) -> list[bytes]:
    folder = sweep.storage / "first"
    return [
        (folder / training.dictionary / TRANSCODER_FILE).read_bytes()
        for training in sweep.trainings()
        if training.dictionary is not None
    ]


@pytest.mark.slow
def test_a_streamed_sweep_survives_a_kill_and_ends_near_a_cached_one(tmp_path: Path) -> None:
    undisturbed, killed, cached = (
        Sweep.create(tmp_path / name, tokens=TOKENS, report_tokens=4096) for name in ("through", "killed", "cached")
    )
    with killed.started("sweep", "first.yaml", LIMIT) as (process, output):
        wait_until_training(killed, process, output)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed.sweep(LIMIT)
    through = undisturbed.sweep(LIMIT)
    assert "as they go" in through.messages
    assert {training.machine["activations"] for training in through.trainings} == {"streamed"}
    assert dictionaries(undisturbed) == dictionaries(killed) and len(dictionaries(killed)) == 2

    plain = cached.sweep()
    assert {training.machine["activations"] for training in plain.trainings} == {"cached"}
    for ours, theirs in zip(through.trainings, plain.trainings, strict=True):
        assert ours.metrics["kl"] == pytest.approx(theirs.metrics["kl"], rel=0.02)

    def size(sweep: Sweep) -> int:
        return sum(file.stat().st_size for file in (sweep.storage / "activations").rglob("L01/*"))

    assert size(undisturbed) == pytest.approx((256 + 64) * 128 * 576 * 2, rel=0.01)
    assert size(cached) == pytest.approx((384 + 64) * 128 * 576 * 2, rel=0.01)
