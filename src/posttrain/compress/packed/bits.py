"""Codes of b bits each in bytes, lowest bits first, rows apart: what is stored is what the bit count says."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_width(columns: int, bits: int) -> int:
    """Bytes that a row of `columns` codes takes."""
    return (columns * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """`[rows, columns]` integers from 0 to 2**bits - 1 -> `[rows, ceil(columns * bits / 8)]` uint8.

    Code i of a row takes the bits from i * bits on, counted from the lowest bit of the first byte.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"codes of {bits} bits; expected 1 to 8")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise ValueError(f"codes from {int(codes.min())} to {int(codes.max())} do not fit into {bits} bits")
    rows, columns = codes.shape
    if bits == 8:
        return codes.to(torch.uint8)
    planes = (codes.to(torch.uint8)[:, :, None] >> torch.arange(bits, dtype=torch.uint8)) & 1
    flat = planes.reshape(rows, columns * bits)
    padded = torch.zeros(rows, packed_width(columns, bits) * 8, dtype=torch.uint8)
    padded[:, : columns * bits] = flat
    weights = (1 << torch.arange(8, dtype=torch.int32)).to(torch.int32)
    return (padded.view(rows, -1, 8).to(torch.int32) * weights).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: `[rows, columns]` uint8."""
    if bits == 8:
        return packed[:, :columns]
    rows = packed.shape[0]
    if 8 % bits == 0:  # whole codes a byte: shifts without single bits
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((packed[:, :, None] >> shifts) & ((1 << bits) - 1)).reshape(rows, -1)[:, :columns]
    single = (packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    codes = single.reshape(rows, -1)[:, : columns * bits].reshape(rows, columns, bits)
    return (codes << torch.arange(bits, dtype=torch.uint8, device=packed.device)).sum(-1).to(torch.uint8)
