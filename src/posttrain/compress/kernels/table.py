"""Products of codes that a table gives their values: `w = scale table[code]` (`packed.table`).

Tables of up to 5 bits stand in registers; larger ones are looked up in memory, a row of weights at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.compress.kernels.gpu.choice import multiplies
from posttrain.compress.kernels.library import DTYPES, address, call, mismatch
from posttrain.compress.kernels.uniform import check_codes, rows_of

_HALF, _FLOAT, _BYTE = 0, 1, 2
PEAK, SMALLEST = 256, 1e-12  # rows of a group that share a peak; the smallest scale


@dataclass(frozen=True)
class GroupScales:
    """`[out, groups]` scales as they are stored.

    codes: fp16 or fp32 scales; or uint8, which stand for `table[code]`, or `table[code] * peak + whole` with peaks
    `[ceil(out / 256), groups]` fp32. table: `[256]` fp32.
    """

    codes: Tensor
    table: Tensor | None = None
    peaks: Tensor | None = None
    whole: float = 0.0

    def in_full(self) -> Tensor:
        """`[out, groups]` fp16 or fp32."""
        if self.table is None:
            return self.codes
        found = self.table.to(self.codes.device)[self.codes.long()]
        if self.peaks is None:
            return found
        return (found * self.peaks.repeat_interleave(PEAK, 0)[: len(found)] + self.whole).clamp(min=SMALLEST)

    @property
    def kind(self) -> int:
        return {torch.float16: _HALF, torch.float32: _FLOAT, torch.uint8: _BYTE}[self.codes.dtype]


def table_product(inputs: Tensor, codes: Tensor, table: Tensor, scales: GroupScales, bits: int) -> Tensor:
    """`[..., in]` fp32 or bf16 -> `[..., out]`. codes: `[out, ceil(in * bits / 8)]` uint8. table: `[2**bits]` fp32."""
    rows, groups = scales.codes.shape
    columns = inputs.shape[-1]
    check_codes(columns, codes, scales.codes, bits)
    if multiplies(inputs):
        from posttrain.compress.kernels.gpu import _table

        return _table.table_product(inputs, codes, table, scales.in_full(), bits)
    x = rows_of(inputs)
    out = torch.empty(x.shape[0], rows, dtype=x.dtype)
    call(
        "table_product", address(codes), address(table), address(scales.codes), scales.kind, address(scales.table),
        address(scales.peaks), scales.whole, rows, columns, groups, bits, x.data_ptr(), DTYPES[x.dtype], x.shape[0],
        x.stride(0), out.data_ptr(), work=rows * columns,
    )  # fmt: skip
    return out.view(*inputs.shape[:-1], rows)


def table_values(
    columns: int, codes: Tensor, table: Tensor, scales: GroupScales, bits: int,
    dtype: torch.dtype = torch.float32, rows: slice = slice(None),
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The values of some rows, `[rows, columns]` fp32, or bf16 rounded from that; in `out` where it is given."""
    all_rows, groups = scales.codes.shape
    check_codes(columns, codes, scales.codes, bits)
    begin, end, _ = rows.indices(all_rows)
    if out is None:
        out = torch.empty(end - begin, columns, dtype=dtype)
    elif out.shape != (end - begin, columns) or not out.is_contiguous():
        raise mismatch(f"room of {list(out.shape)} for {end - begin} rows of {columns}")
    call(
        "table_values", address(codes), address(table), address(scales.codes), scales.kind, address(scales.table),
        address(scales.peaks), scales.whole, all_rows, columns, groups, bits, begin, end - begin, out.data_ptr(),
        DTYPES[out.dtype], work=out.numel(),
    )  # fmt: skip
    return out
