"""Compiled kernels on disk: used again to the last bit, and never after a change in any file that they are made of."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# one file's kernel made of another file's function
PROBE = """
from qkmodel.kernels.machine_code import kernel
from qkmodel.kernels.numerics_cpu import exponential


@kernel
def probe(x):
    return exponential(x)
"""
SCRIPT = """
import json, numba, numpy
from qkmodel.kernels.probe import probe
value = probe(numpy.float32(0.0))
print(json.dumps([value, sum(probe.stats.cache_hits.values()), numba.config.CACHE_DIR]))
"""

DIGEST = """
import hashlib
import torch
from qkmodel.kernels.pattern_kl_cpu import _softmax_gradients
from qkmodel.pattern_kl import pattern_kl, true_pattern
from tests.qkmodel.layers import random_layer

torch.set_num_threads(1)
torch.manual_seed(0)
digest = hashlib.sha256()
for soft_cap in (None, 5.0):
    layer = random_layer(n_heads=9, n_kv_heads=3, d_head=64, rotary_dim=64, d_model=64, soft_cap=soft_cap)
    q, k = layer.project(torch.randn(4, 128, 64))
    q_hat = (q + 0.3 * torch.randn_like(q)).requires_grad_()
    k_hat = (k + 0.3 * torch.randn_like(k)).requires_grad_()
    for dtype in (torch.float32, torch.bfloat16):
        loss = pattern_kl(q_hat, k_hat, true_pattern(layer, q, k, dtype))
        for value in (loss.total, *torch.autograd.grad(loss.total, (q_hat, k_hat))):
            digest.update(value.detach().numpy().tobytes())
print(sum(_softmax_gradients.stats.cache_misses.values()), digest.hexdigest())
"""


@pytest.fixture
def install(tmp_path: Path) -> Path:
    """A copy of the package that may be edited."""
    copy = shutil.copytree(ROOT / "qkmodel", tmp_path / "install" / "qkmodel", ignore=shutil.ignore_patterns("*cache*"))
    (copy / "kernels" / "probe.py").write_text(PROBE)
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


def test_what_was_just_compiled_rounds_as_what_is_read_from_disk(tmp_path: Path) -> None:
    said = []
    for _ in range(2):
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        answer = subprocess.run(
            [sys.executable, "-c", DIGEST], env=environment, cwd=ROOT, capture_output=True, text=True
        )
        assert answer.returncode == 0, answer.stderr
        said.append(answer.stdout.split())
    (compiled, first), (compiled_again, second) = said
    assert int(compiled) > 0 and int(compiled_again) == 0
    assert first == second
