"""Compiled kernels on disk: used again, and never after a change in any file that they are made of."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# _exponentials stands in one file, the `exponential` in it in another
SCRIPT = """
import json, numba, numpy
from qkmodel.kernels.pattern_comparison_cpu import _exponentials
total = _exponentials(numpy.zeros(1, numpy.float32))
print(json.dumps([total, sum(_exponentials.stats.cache_hits.values()), numba.config.CACHE_DIR]))
"""


@pytest.fixture
def install(tmp_path: Path) -> Path:
    """A copy of the package that may be edited."""
    copy = shutil.copytree(ROOT / "qkmodel", tmp_path / "install" / "qkmodel", ignore=shutil.ignore_patterns("*cache*"))
    return copy / "kernels"


def run(install: Path, **environment: str) -> tuple[float, int, str]:
    """exp(0) by a new process, how often it found machine code, and where others would keep theirs."""
    environment = os.environ | {"PYTHONPATH": str(install.parents[1]), **environment}
    command = [sys.executable, "-c", SCRIPT]
    ran = subprocess.run(command, env=environment, cwd=install, capture_output=True, text=True, check=True)
    return tuple(json.loads(ran.stdout))


def folders(place: Path) -> list[str]:
    return [folder.name for folder in place.glob("kernels-*")]


def test_a_change_in_another_file_is_noticed(install: Path) -> None:
    assert run(install) == (1.0, 0, "")
    assert run(install) == (1.0, 1, "")
    source = install / "numerics_cpu.py"
    source.write_text(source.read_text().replace("p = p * r * r + r + np.float32(1.0)", "p = np.float32(2.0)"))
    assert run(install) == (2.0, 0, "")
    assert len(folders(install / "__pycache__")) == 2


def test_an_install_that_cannot_be_written_to_keeps_them_in_the_users_cache(install: Path, tmp_path: Path) -> None:
    # a file in the folder's place: as root, permissions would stop nobody
    (install / "__pycache__").write_text("")
    assert [run(install, XDG_CACHE_HOME=str(tmp_path))[:2] for _ in range(2)] == [(1.0, 0), (1.0, 1)]
    assert len(folders(tmp_path / "qkmodel")) == 1
    (tmp_path / "nowhere").write_text("")
    assert run(install, XDG_CACHE_HOME=str(tmp_path / "nowhere"))[:2] == (1.0, 0)


def test_numbas_own_setting_is_followed_and_left_as_it_is(install: Path, tmp_path: Path) -> None:
    place = tmp_path / "numba"
    assert run(install, NUMBA_CACHE_DIR=str(place)) == (1.0, 0, str(place))
    assert len(folders(place)) == 1 and folders(install / "__pycache__") == []
