"""What a device can do: its memory, how fast it multiplies and how fast it reads."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass

import torch

from posttrain.models.load import best_dtype
from posttrain.trajectory import PosttrainError

GIB = 1 << 30
CONTEXT = 0.75 * GIB  # what a process holds on a GPU before its first tensor: the driver's context and its libraries
UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12,
         "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40,
         "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Device:
    """kind: cpu or cuda. memory: bytes. throughput: bf16 operations a second of dense products, as its data sheet says
    or as measured. bandwidth: bytes a second of its memory. process: bytes that are taken before the first tensor.
    """

    name: str
    kind: str
    memory: float
    throughput: float
    bandwidth: float
    process: float


# dense bf16 operations and bytes a second, from the makers' data sheets
GPUS = {
    "a100": Device("A100 80GB", "cuda", 80 * GIB, 312e12, 2.0e12, CONTEXT),
    "h100": Device("H100 SXM", "cuda", 80 * GIB, 989e12, 3.35e12, CONTEXT),
    "h200": Device("H200", "cuda", 141e9, 989e12, 4.8e12, CONTEXT),
    "b200": Device("B200", "cuda", 180e9, 2250e12, 7.7e12, CONTEXT),
    "l40s": Device("L40S", "cuda", 48e9, 362e12, 0.864e12, CONTEXT),
    "rtx4090": Device("RTX 4090", "cuda", 24e9, 165e12, 1.0e12, CONTEXT),
}


def parse_bytes(text: str) -> float:
    """`80GiB`, `24GB` or `1.5T` in bytes. Raises PosttrainError for anything else."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in UNITS or not float(found[1]):
        raise PosttrainError(f"{text!r} is no amount of memory; expected a number with a unit, as in 80GiB or 24GB")
    return float(found[1]) * UNITS[found[2].lower()]


def show_bytes(count: float) -> str:
    """Bytes in a few characters: `512 MiB`, `3.42 GiB`."""
    for unit, name in ((1 << 40, "TiB"), (GIB, "GiB"), (1 << 20, "MiB")):
        if count >= unit:
            return f"{count / unit:.{2 if name != 'MiB' else 0}f} {name}"
    return f"{count / 1024:.0f} KiB"


def this_machine(memory: float | None = None) -> Device:
    """The CPU here: its speed is measured in about a second, and what this process holds now (Python and the imported
    libraries, which training imports as well) is what a process takes before its first tensor.
    """
    process = resident()
    dtype = best_dtype(torch.device("cpu"))
    return Device(
        name=f"this machine's CPU, {torch.get_num_threads()} threads, {str(dtype).removeprefix('torch.')}",
        kind="cpu",
        memory=memory or float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        throughput=matrix_throughput(dtype, side=1024, repetitions=5),
        bandwidth=_bandwidth(),
        process=process,
    )


def resident() -> float:
    """Bytes of memory that this process occupies (Linux; elsewhere 0, which is then left out of a plan)."""
    try:
        with open("/proc/self/statm") as file:  # noqa: PTH123 - a file of the kernel
            return float(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0.0


def matrix_throughput(dtype: torch.dtype, side: int = 2048, repetitions: int = 30) -> float:
    """Operations a second of a `side`³ matrix product, the best of several."""
    a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repetitions):
        begun = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begun)
    return 2 * side**3 / best


def _bandwidth(size: int = 1 << 26, repetitions: int = 4) -> float:
    """Bytes a second that a copy reads and writes, the best of several."""
    source, target = torch.ones(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    best = float("inf")
    for _ in range(repetitions):
        begun = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - begun)
    return 2 * size / best
