"""Freed memory is kept: blocks that were freed are reused without new pages."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

REUSE = """
import ctypes, resource
import torch
from posttrain.models.allocator import LARGEST_KEPT, M_MMAP_THRESHOLD, M_TOP_PAD, M_TRIM_THRESHOLD, keep_freed_memory

def faults():
    def step():
        return [torch.ones(2 << 20) for _ in range(8)]  # 8 MiB each, all freed together

    for _ in range(5):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

mallopt = ctypes.CDLL(None).mallopt  # a heap that is trimmed at once, whatever the environment says
assert mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(M_TRIM_THRESHOLD, 0) and mallopt(M_TOP_PAD, 0)
plain = faults()
assert keep_freed_memory()
print(plain, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_large_blocks_are_reused_without_new_pages() -> None:
    found = subprocess.run([sys.executable, "-c", REUSE], capture_output=True, text=True, check=True)
    plain, kept = map(int, found.stdout.split())
    assert plain > 1000  # the measurement sees the pages of a heap that is trimmed
    assert kept < plain / 20
