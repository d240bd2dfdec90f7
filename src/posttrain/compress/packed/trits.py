"""Trits, five a byte: 1.6 bits each where their information is log2 3 = 1.585."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

TRITS = 5  # 3**5 = 243 of a byte's 256 values


def trit_bytes(columns: int) -> int:
    """Bytes that a row of `columns` trits takes."""
    return -(-columns // TRITS)


def pack_trits(trits: Tensor) -> Tensor:
    """`[..., columns]` of -1, 0, 1 -> `[..., ceil(columns / 5)]` uint8; trit i of a byte weighs 3**i."""
    if trits.numel() and (int(trits.min()) < -1 or int(trits.max()) > 1):
        raise ValueError(f"trits from {int(trits.min())} to {int(trits.max())}; expected -1 to 1")
    columns = trits.shape[-1]
    digits = F.pad(trits.to(torch.int32) + 1, (0, trit_bytes(columns) * TRITS - columns))
    powers = 3 ** torch.arange(TRITS, dtype=torch.int32, device=trits.device)
    return (digits.unflatten(-1, (-1, TRITS)) * powers).sum(-1).to(torch.uint8)


def unpack_trits(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_trits`, as fp32: one look into a table a byte."""
    found = _table().to(packed.device).index_select(0, packed.reshape(-1).int())
    return found.view(*packed.shape[:-1], -1)[..., :columns]


@functools.cache
def _table() -> Tensor:
    every = torch.arange(256)[:, None]
    return ((every // 3 ** torch.arange(TRITS)) % 3 - 1).float()
