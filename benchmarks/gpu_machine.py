"""What the figures of `benchmarks.gpu` are measured on, its ceilings, and the kernels of packed weights beside them."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F

from posttrain.compress.packed.scales import Scales
from posttrain.compress.packed.table import TableWeight
from posttrain.compress.packed.ternary import TernaryWeight
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.compress.packed.vector import Books, VectorWeight

GROUP = 128
BF16 = "torch bf16"
Call = Callable[[], object]


def about(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "trl", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "memory_mib": properties.total_memory // 2**20, "cuda": torch.version.cuda}
        found |= {"capability": list(torch.cuda.get_device_capability(device)), "driver": _driver()}
    return found


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def seconds_of(calls: Sequence[Call], device: torch.device, least: float = 0.02) -> float:
    """Seconds a call, going through all of them in turn; on a GPU as a graph replays them, so without what launching
    them costs, else by the clock.
    """
    for call in calls[:2]:
        call()
    if device.type != "cuda":
        begun = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - begun) / len(calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return _between(graph.replay, least) / len(calls)


def launched(calls: Sequence[Call], device: torch.device, least: float = 0.02) -> float:
    """Seconds a call as Python makes it, launches included."""

    def all_of_them() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        return seconds_of(calls, device)
    return _between(all_of_them, least) / len(calls)


def _between(call: Call, least: float) -> float:
    """Seconds of a call between two events of the device: warmed up, then repeated for a while."""

    def run(times: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    run(1)
    once = run(2) / 2
    times = max(2, min(2000, round(least / max(once, 1e-6))))
    return run(times) / times


def ceilings(device: torch.device, side: int, repetitions: int) -> dict[str, Any]:
    """Operations a second of a `side`³ product in bf16, and bytes a second that a copy reads and writes; on random
    numbers, the best of several, and all of them.
    """
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    products = [2 * side**3 / seconds_of([lambda: torch.mm(a, b, out=out)] * 10, device) for _ in range(repetitions)]
    source = torch.randint(-128, 127, (side * side * 16,), device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    copies = [2 * source.numel() / seconds_of([lambda: target.copy_(source)] * 5, device) for _ in range(repetitions)]
    return {"flops": max(products), "each_flops": products, "bytes": max(copies), "each_bytes": copies}


# Kernels


def weights(side: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Makers of packed matrices `[side, side]`; what the codes are does not matter to the time."""

    def filled(made: Any) -> Any:
        made = made.to(device)
        for name, held in made.named_buffers():
            if held.dtype == torch.uint8:
                held.random_(0, 243 if name == "trits" else 256)
            elif held.is_floating_point():
                held.uniform_(0.01, 0.02)
        return made

    def uniform(bits: int) -> Any:
        return filled(UniformWeight((side, side), bits, side // GROUP, "integer", False))

    def nf4() -> Any:
        codes = torch.zeros(side, side, dtype=torch.uint8)
        return filled(TableWeight.of(codes, Scales.of(torch.ones(side, side // 64), "half"), 4, "nf4"))

    def ternary() -> Any:
        trits = torch.zeros(2, side, side, dtype=torch.int8)
        return filled(TernaryWeight.of(trits, torch.ones(2, side, side // GROUP)))

    def vectors() -> Any:
        index = torch.zeros(side // 8, side, dtype=torch.int64)
        return filled(VectorWeight.of(side, [(Books(8, 16), index, torch.randn(1 << 16, 8), None)]))

    return {
        **{f"{bits} bits, groups of {GROUP}": partial(uniform, bits) for bits in (2, 3, 4, 8)},
        "NF4, groups of 64": nf4, "two ternary planes": ternary, "vectors of 8, 2 bits": vectors,
    }  # fmt: skip


def kernels(side: int, device: torch.device, repetitions: int, streamed: int) -> dict[str, Any]:
    """One row of bf16 inputs by each packed matrix and by torch's, in turn, going through copies of `streamed` bytes
    together, more than the caches hold: seconds a product, the ratio to torch's, bytes a second.
    """
    x = torch.randn(1, side, device=device, dtype=torch.bfloat16)
    plain = [
        torch.randn(side, side, device=device, dtype=torch.bfloat16)
        for _ in range(max(2, streamed // (2 * side * side)))
    ]
    calls: dict[str, list[Call]] = {BF16: [lambda w=w: F.linear(x, w) for w in plain]}  # type: ignore[misc]
    size = {BF16: 2 * side * side}
    failed: dict[str, str] = {}
    with torch.no_grad():
        for name, make in weights(side, device).items():
            try:
                one = make()
                size[name] = sum(t.numel() * t.element_size() for t in one.buffers())
                held = [one, *(make() for _ in range(min(63, max(1, streamed // size[name]) - 1)))]
                calls[name] = [lambda w=w: w.product(x) for w in held]  # type: ignore[misc]
                seconds_of(calls[name], device, 1e-3)  # which shows whether it runs at all
            except (RuntimeError, NotImplementedError, ValueError) as error:
                failed[name] = " ".join(str(error).split())[:200]
                calls.pop(name, None)
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repetitions):
            for name, each in calls.items():
                seconds[name].append(seconds_of(each, device))
        outside = {name: launched(each, device) for name, each in calls.items()}
    found: dict[str, Any] = {"failed": failed} if failed else {}
    for name, taken in seconds.items():
        ratio = [b / s for b, s in zip(seconds[BF16], taken, strict=True)]
        found[name] = {
            "seconds": taken, "ratio": [statistics.median(ratio), min(ratio), max(ratio)], "bytes": size[name],
            "bytes_per_second": size[name] / statistics.median(taken), "launched_seconds": outside[name],
            "launched_ratio": outside[BF16] / outside[name],
        }  # fmt: skip
    return found
