"""Labels of the tokens of a cache: few channels of their keys, in few bits.

A label has an even grid from the least to the largest of its channels. Packed, it is `[..., words + 3]` int32: codes of
4 bits, of which byte j holds channel j and, above it, channel `4 * words + j`; then, as fp32, step, least value and the
sum of the levels.

Reference: Post-training sparse attention with Double Sparsity, 2024, arXiv 2408.07092 (card 146).
"""

from __future__ import annotations

import torch
from torch import Tensor

FULL = 16  # label bits that mean: as the keys are
PACKED = 4  # the most bits that are packed


def rounded(labels: Tensor, bits: int) -> Tensor:
    """`[..., r]` to the nearest levels of the grid, in the dtype that they came in."""
    if bits == FULL:
        return labels
    codes, step, low = _codes(labels, bits)
    return (codes * step + low).to(labels.dtype)


def packed(labels: Tensor, bits: int) -> Tensor:
    """`[..., r]` to `[..., words + 3]` int32, with an even number of words."""
    codes, step, low = _codes(labels, bits)
    total = codes.sum(-1, keepdim=True) * step + low * codes.shape[-1]
    size = 8 * -(-codes.shape[-1] // 16)
    lower, upper = torch.nn.functional.pad(codes.to(torch.uint8), (0, 2 * size - codes.shape[-1])).split(size, -1)
    return torch.cat([(lower | upper << 4).view(torch.int32), *(t.view(torch.int32) for t in (step, low, total))], -1)


def unpacked(held: Tensor, count: int) -> Tensor:
    """`[..., words + 3]` int32 to the levels `[..., count]` fp32."""
    both = held[..., :-3].contiguous().view(torch.uint8)
    step, low, _ = held[..., -3:].contiguous().view(torch.float32).split(1, -1)
    return torch.cat([both & 15, both >> 4], -1)[..., :count] * step + low


def reads(length: int, width: int, count: int, tokens: int, label_bits: int = FULL) -> float:
    """Numbers of 16 bits that a head reads in a decode step over `length` tokens: labels, then k keys and values.

    Dense attention reads `2 * length * width`.
    """
    return length * count * label_bits / 16 + 2 * min(tokens, length) * width


def _codes(labels: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, step and least value of each label, fp32."""
    labels = labels.float()
    low, high = labels.aminmax(dim=-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    return ((labels - low) / step).round(), step, low
