"""How the memory allocator of a process that makes one pass or step after another treats what is freed."""

import ctypes

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
# the largest that glibc comes to by itself
_LARGEST_KEPT = 32 * 2**20
_KEPT = 256 * 2**20
# as long as one of the pieces that a thread's memory comes in, which else go back as soon as they are empty
_RESERVED = 64 * 2**20


def keep_freed_memory() -> None:
    """Has glibc keep what a thread freed, in pieces of up to 32 MiB, for what is allocated next.

    A thread then keeps all that it ever had at once (the main one up to 256 MiB), and one that starts later takes over
    the memory of one that has ended, whatever either is for: without `give_back_memory` now and then a process grows.

    By default it gives tensors' pages back to the system, which zeroes new ones for the next tensors: an eighth of a
    forward pass's time, a few percent of a training step's. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
        mallopt(_M_TOP_PAD, _RESERVED)


def give_back_memory() -> None:
    """Gives the system what all threads have freed."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
