"""Compiling the CPU's loops, and where their machine code is kept.

Numba keeps a function's machine code for as long as that function's own file stays as it is, but a kernel holds code
and constants of the other files here too. So the folder it is kept in is named by a hash of all of them.
"""

import hashlib
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numba

from qkmodel.files import user_cache_folder

# Sums may be reordered to vectorise. Not `ninf`: a score of −inf is a key that cannot be seen.
FAST_MATH = {"reassoc", "contract", "nsz", "arcp", "nnan"}
# Of what kernels call. Called instead of inlined, it would stand in the process twice where the kernel was compiled
# rather than read from disk, once by itself and once optimised with the kernel, and the two may round differently.
INLINED = {"forceinline": True}


def kernel(function: Any) -> Any:
    """Compiles a loop at first use, keeps the machine code on disk, and lets other Python threads run meanwhile."""
    compiled = numba.njit(function, nogil=True, fastmath=FAST_MATH, error_model="numpy")
    folder = _folder()
    if folder is not None:
        # other users of Numba in this process keep theirs where they did
        others, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
        try:
            compiled.enable_caching()
        finally:
            numba.config.CACHE_DIR = others
    return compiled


def inlined(function: Any) -> Any:
    """Compiles a part of kernels, always into its caller."""
    return numba.njit(function, nogil=True, fastmath=FAST_MATH, error_model="numpy", **INLINED)


@cache
def _folder() -> Path | None:
    """The first place that can be written to: `$NUMBA_CACHE_DIR`, beside the sources, or the user's cache.

    None where nothing can: kernels are then compiled anew in every process.
    """
    own, asked = Path(__file__).parent, numba.config.CACHE_DIR
    name = f"kernels-{_sources_hash(own)}"
    for place in [Path(asked)] if asked else [own / "__pycache__", user_cache_folder()]:
        folder = place / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # permissions alone do not tell: root may write everywhere, and a read-only disk takes nothing
            tempfile.TemporaryFile(dir=folder).close()
        except OSError:
            continue
        return folder
    return None


def _sources_hash(folder: Path) -> str:
    files = sorted(folder.glob("*.py"))
    digests = (f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n" for file in files)
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
