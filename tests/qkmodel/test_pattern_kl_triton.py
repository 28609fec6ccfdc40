"""The GPU form of the pattern loss: its values and gradients wherever these tests run, and what an H100 would load.

Without a GPU the cases run in Triton's interpreter. Triton decides at its first import whether to interpret, and
other tests import it too, so the cases get a process of their own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from qkmodel.kernels import pattern_kl_triton_kernels as kernels
from qkmodel.kernels.pattern_kl_triton import choose_tile, padded

CASES = Path(__file__).with_name("pattern_kl_triton_cases.py")
H100 = GPUTarget("cuda", 90, 32)
H100_SHARED_BYTES = 227 * 1024
KERNELS = [kernels.true_log_sums, kernels.row_normalisers, kernels.query_gradient, kernels.key_gradient]
PRODUCTS = {"queries", "keys", "query_changes", "key_changes"}
NUMBERS = {"context": "i32", "window": "i32", "factor": "fp32"}
ELEMENTS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def test_cases() -> None:
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", str(CASES)],
        cwd=CASES.parents[2],
        env=os.environ | interpret,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def compiled_for_h100(kernel: triton.JITFunction, d_head: int, soft_cap: float, dtype: torch.dtype) -> CompiledKernel:
    tile = choose_tile(d_head, dtype)
    constants = dict(N_HEADS=8, N_KV_HEADS=4, D_HEAD=d_head, DEPTH=padded(d_head), SOFT_CAP=soft_cap)
    constants |= dict(OWN=tile.own, STEP=tile.step)
    types = {
        name: NUMBERS.get(
            name, "constexpr" if name in constants else ELEMENTS[dtype if name in PRODUCTS else torch.float32]
        )
        for name in kernel.arg_names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if types[name][0] == "*"}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(ASTSource(kernel, types, constants, aligned), target=H100, options=options)


def spilled_bytes(compiled: CompiledKernel, folder: Path) -> int:
    """Bytes of a thread's stack, where registers that did not fit go."""
    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


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
    for kernel in KERNELS:
        compiled = compiled_for_h100(kernel, d_head, soft_cap, dtype)
        assert compiled.metadata.shared <= H100_SHARED_BYTES
        assert spilled_bytes(compiled, tmp_path) <= spills
        # bfloat16 products must reach the tensor cores, float32 ones must not be rounded to TF32
        assert ("wgmma" in compiled.asm["ptx"]) == (dtype == torch.bfloat16)
        assert "tf32" not in compiled.asm["ptx"]
