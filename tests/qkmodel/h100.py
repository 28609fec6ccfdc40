"""What an H100 would load of a Triton kernel: compiled here, where there is none."""

import re
import subprocess
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

TARGET = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 * 1024


def compiled(
    kernel: triton.JITFunction, types: dict[str, str], constants: dict[str, object], **options: int
) -> CompiledKernel:
    """`types` of the arguments that are no constants, as Triton spells them; pointers are aligned as torch's are."""
    of_all = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(of_all) if of_all[name][0] == "*"}
    return triton.compile(ASTSource(kernel, of_all, constants, aligned), target=TARGET, options=options)


def spilled_bytes(kernel: CompiledKernel, folder: Path) -> int:
    """Bytes of a thread's stack, where registers that did not fit go."""
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])
