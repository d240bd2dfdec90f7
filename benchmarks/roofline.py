"""The roofline: the floating-point work a step needs, over the matrix throughput measured on the same machine.

The work is what an algorithm without any waste computes: a prompt shared by a pair or a group once, no padding, the
vocabulary projection only for tokens that are predicted, no recomputation. Norms, softmax, the optimizer and memory
traffic are left out, so nothing reaches a distance of 1.
"""

from __future__ import annotations

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


def matrix_throughput() -> dict[str, float]:
    """Operations a second of a 2048³ matrix product, the best of 30, by dtype."""
    import torch

    from posttrain.plan.device import matrix_throughput as of

    return {"bf16": of(torch.bfloat16), "fp32": of(torch.float32)}
