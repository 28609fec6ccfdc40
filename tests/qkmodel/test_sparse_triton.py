"""Sparse transcoders on a GPU: their results wherever these tests run, and what an H100 would load."""

from pathlib import Path

import pytest
import triton

from qkmodel.kernels import sparse_triton_kernels as kernels
from qkmodel.kernels.sparse_triton import STEP, warps_of
from tests.qkmodel.h100 import SHARED_BYTES, compiled, spilled_bytes
from tests.qkmodel.triton_cases import run_cases

WEIGHTS = dict.fromkeys(("x", "w_enc", "b_enc", "w_dec", "b_out", "values", "y", "dy"), "*fp32")
COUNTS = dict.fromkeys(("features", "counts", "cursors", "active"), "*i32")
SIZES = dict.fromkeys(("width", "d_in", "d_out"), "i32")
CODES = dict.fromkeys(("all_values", "all_gradients", "rounded_dy"), "*bf16")
TYPES = WEIGHTS | COUNTS | SIZES | CODES | {"bits": "*i16"}


def test_cases() -> None:
    run_cases("sparse_triton_cases.py")


@pytest.mark.parametrize("width", [1024, 2400, 16_384, 32_768])
def test_choosing_compiles_for_an_h100(width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    row = triton.next_power_of_2(width)
    loaded = compiled(kernels.choose_largest, TYPES, dict(K=16, NEAR=511, GROUP=4, ROW=row), num_warps=warps_of(row))
    assert spilled_bytes(loaded, tmp_path) <= (0 if width <= 16_384 else 512)
    assert loaded.metadata.shared <= SHARED_BYTES


@pytest.mark.parametrize("depth", [768, 4096])
def test_codes_compile_for_an_h100(depth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    out = dict(K=16, STEP=STEP, DEPTH_OUT=triton.next_power_of_2(depth))
    encoding = compiled(kernels.encode_and_decode, TYPES, out | dict(PLACES=16, DEPTH_IN=out["DEPTH_OUT"]))
    spreading = compiled(kernels.spread_code, TYPES, out | dict(ROW=4096))
    for loaded in (encoding, spreading):
        assert loaded.metadata.shared <= SHARED_BYTES
        assert spilled_bytes(loaded, tmp_path) == 0
