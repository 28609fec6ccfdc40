"""A disk that fills up, or goes away, in the middle of real trainings."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.test_kills import Sweep

pytestmark = pytest.mark.system

TOKENS = 16_384
SPACE = {"dictionary_size": [256, 512], "activation": "topk", "k": [4, 8], "learning_rate": 6e-3}
SEARCH = {"sampler": "grid", "trainings": 4, "space": SPACE}
# what the activation cache and the databases take, and less than two checkpoints beyond that
TOO_SMALL, LARGE_ENOUGH = "size=36m", "size=600m"

Remount = Callable[[str], None]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Remount]]:
    """A file system of its own, and what changes its options."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", LARGE_ENOUGH, "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a file system takes rights that this process does not have")

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)

    yield folder, remount
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_a_sweep_in_one_line_and_once_there_is_room_it_continues(
    disk: tuple[Path, Remount], tmp_path: Path
) -> None:
    folder, remount = disk
    remount(TOO_SMALL)
    sweep = Sweep.create(tmp_path / "sweep", TOKENS, search=SEARCH, storage=str(folder / "runs"))
    assert sweep.start().wait(timeout=300) == 1
    said = sweep.said
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: ") and "once that is mended the same command continues" in said
    remount(LARGE_ENOUGH)
    trainings = sweep.trainings()
    assert {(one.state, one.failures) for one in trainings} == {("open", 0)}
    sweep.run()
    assert {one.training_id for one in trainings} <= {one.training_id for one in sweep.trainings()}
    assert [one.state for one in sweep.trainings()] == ["finished"] * 4


@pytest.mark.slow
def test_a_folder_that_goes_away_ends_a_sweep_in_one_line(disk: tuple[Path, Remount], tmp_path: Path) -> None:
    """As a network file system does."""
    here, (there, _) = tmp_path / "share", disk
    here.mkdir()
    subprocess.run(["mount", "--bind", there, here], check=True)
    sweep = Sweep.create(tmp_path / "sweep", 8 * TOKENS, search=SEARCH, storage=str(here / "runs"))
    process = sweep.start()
    while sum(one.tokens_done for one in sweep.trainings()) == 0:
        assert process.poll() is None, sweep.said
    subprocess.run(["umount", "--lazy", here], check=True)
    assert process.wait(timeout=120) == 1
    assert "Traceback" not in sweep.said and sweep.said.splitlines()[-1].startswith("error: ")
    subprocess.run(["mount", "--bind", there, here], check=True)
    try:
        assert not any(one.state == "failed" for one in sweep.trainings())
        sweep.run()
        assert [one.state for one in sweep.trainings()] == ["finished"] * 4
    finally:
        subprocess.run(["umount", "--lazy", here], check=True)
