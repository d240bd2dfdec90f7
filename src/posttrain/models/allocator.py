"""Keeping freed memory: on Linux, large tensors are otherwise given back to the system after every use and zeroed anew.

A training step allocates the same kinds of tensors again and again. glibc returns memory at the top of its heap as soon
as it is free, so every step pays for clearing gigabytes of pages, an eighth of its time. Told to keep its heap, it pays
about half of that. The very largest blocks stay with the system: kept as well, they would fragment the heap until the
process is half as large again (measured on steps of varying length).
"""

from __future__ import annotations

import ctypes
import functools
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # from malloc.h
LARGEST_KEPT = 16 << 20  # bytes
PAD = 64 << 20  # bytes by which the heap grows beyond what is asked for


@functools.cache
def keep_freed_memory() -> bool:
    """Serve blocks up to 16 MiB from a heap that is not trimmed. Returns whether the C library took it (glibc on Linux
    only)."""
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(M_TOP_PAD, PAD)
    )
