"""The GPU form of the pattern loss: its values and gradients wherever these tests run, and what an H100 would load."""

from pathlib import Path

import pytest
import torch

from qkmodel.kernels import pattern_kl_triton_kernels as kernels
from qkmodel.kernels.pattern_kl_triton import TURNED_AT_ONCE, choose_tile, padded
from tests.qkmodel.h100 import SHARED_BYTES, compiled, spilled_bytes
from tests.qkmodel.triton_cases import run_cases

KERNELS = [kernels.true_log_sums, kernels.row_normalisers, kernels.query_gradient, kernels.key_gradient]
PRODUCTS = ("queries", "keys", "query_changes", "key_changes")
OTHERS = ("log_sums", "normalisers", "sums", "gradient")
NUMBERS = {"context": "i32", "window": "i32", "factor": "fp32"}
ELEMENTS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def test_cases() -> None:
    run_cases("pattern_kl_triton_cases.py")


@pytest.mark.parametrize(
    ("dtype", "d_head", "soft_cap", "spills"),
    [
        (torch.bfloat16, 64, 0.0, 0),
        (torch.bfloat16, 80, 0.0, 0),
        (torch.bfloat16, 128, 30.0, 0),
        (torch.bfloat16, 256, 50.0, 0),
        (torch.float32, 64, 0.0, 16),
    ],
)
def test_compiles_for_an_h100_and_fits(
    dtype: torch.dtype, d_head: int, soft_cap: float, spills: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    tile = choose_tile(d_head, dtype)
    types = NUMBERS | dict.fromkeys(PRODUCTS, ELEMENTS[dtype]) | dict.fromkeys(OTHERS, "*fp32")
    constants = dict(N_HEADS=8, N_KV_HEADS=4, D_HEAD=d_head, DEPTH=padded(d_head), SOFT_CAP=soft_cap)
    constants |= dict(OWN=tile.own, STEP=tile.step)
    for kernel in KERNELS:
        loaded = compiled(kernel, types, constants, num_warps=tile.warps, num_stages=tile.stages)
        assert loaded.metadata.shared <= SHARED_BYTES
        assert spilled_bytes(loaded, tmp_path) <= spills
        # bfloat16 products must reach the tensor cores, float32 ones must not be rounded to TF32
        assert ("wgmma" in loaded.asm["ptx"]) == (dtype == torch.bfloat16)
        assert "tf32" not in loaded.asm["ptx"]


@pytest.mark.parametrize("interleaved", [False, True])
def test_turning_compiles_for_an_h100(interleaved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    types = dict.fromkeys(("source", "cos", "sin", "base"), "*fp32") | {"out": "*bf16", "scale": "fp32"}
    types |= {"rows": "i32", "context": "i32"}
    constants = dict(HEADS=8, D_HEAD=64, DEPTH=64, ROTARY=64, INTERLEAVED=interleaved, BACK=False, HAS_BASE=True)
    constants |= dict(OWN=TURNED_AT_ONCE // 64)
    assert spilled_bytes(compiled(kernels.turn, types, constants), tmp_path) == 0
