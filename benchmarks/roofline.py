"""The roofline: the floating-point work a step needs, over the matrix throughput measured on the same machine.

The work is what an algorithm without any waste computes: a prompt shared by a pair or a group once, no padding, the
vocabulary projection only for tokens that are predicted, no recomputation. Norms, softmax, the optimizer and memory
traffic are left out, so nothing reaches a distance of 1.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

Group = tuple[int, list[int]]  # tokens of a prompt, and of each completion that shares it


@dataclass(frozen=True, slots=True)
class Size:
    """What of a model the work depends on. body: parameters of its linear layers, vocabulary projection left out."""

    body: int
    vocabulary: int
    width: int
    layers: int
    heads: int
    head_width: int


def forward_work(size: Size, groups: Sequence[Group]) -> float:
    """Floating-point operations of one forward pass over `groups`; sampling them needs as much, token by token.

    The last token of a completion is predicted and is no input.
    """
    inputs = predicted = pairs = 0
    for prompt, completions in groups:
        inputs += prompt + sum(c - 1 for c in completions)
        predicted += sum(completions)
        pairs += prompt * (prompt + 1) // 2 + sum((c - 1) * prompt + (c - 1) * c // 2 for c in completions)
    attention = 4 * size.layers * size.heads * size.head_width * pairs  # scores, and the weighted sum of values
    return 2 * size.body * inputs + 2 * size.vocabulary * size.width * predicted + attention


def step_work(size: Size, groups: Sequence[Group], passes: int) -> float:
    """Operations of a step worth `passes` forward passes."""
    return passes * forward_work(size, groups)


def matrix_throughput(side: int = 2048, repetitions: int = 30) -> dict[str, float]:
    """Operations a second of a `side`³ matrix product, the best of several, by dtype."""
    import torch

    found = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
        best = float("inf")
        for _ in range(repetitions):
            begun = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - begun)
        found[name] = 2 * side**3 / best
    return found
