"""Products and values of codes with a table, with every kind of stored scales."""

from __future__ import annotations

import pytest
import torch
from kernel_levels import assert_product, every_level, needs_kernels

from posttrain.compress.kernels.library import forced
from posttrain.compress.kernels.table import table_product, table_values
from posttrain.compress.packed.bits import pack
from posttrain.compress.packed.scales import Scales, whole_of
from posttrain.compress.packed.table import TableWeight

KINDS = ("float", "half", "power", "float8", "double")


def weight(rows: int, columns: int, groups: int, bits: int, kind: str) -> TableWeight:
    scale = torch.rand(rows, groups) / 9 + 0.01
    codes, table = torch.randint(0, 1 << bits, (rows, columns)), torch.randn(1 << bits)
    return TableWeight.of(codes, Scales.of(scale, kind, whole_of(scale, kind)), bits, table)


@needs_kernels
@every_level
@pytest.mark.parametrize("bits", range(1, 9))
def test_equals_the_looked_up_matrix(bits, level):
    torch.manual_seed(bits)
    for kind in KINDS:
        for columns, groups in ((64, 1), (576, 9), (1000, 1), (96, 4), (2048, 32), (15, 5)):
            w = weight(300 if kind == "double" and columns == 96 else 6, columns, groups, bits, kind)
            with forced("off"):
                values = w.dequantize()
            with forced(level):
                arguments = (w.codes, w.levels(), w.scales.for_kernel(), bits)
                assert torch.allclose(table_values(columns, *arguments), values, rtol=1e-6, atol=0)
                for count, dtype in ((1, torch.float32), (6, torch.bfloat16)):
                    x = torch.randn(count, columns).to(dtype)
                    assert_product(table_product(x, *arguments), x, values)


@needs_kernels
@every_level
def test_three_numbers_by_hand(level):
    codes, table = pack(torch.tensor([[2, 0, 3]]), 2), torch.tensor([10.0, 0.0, -1.0, 0.5])
    w = TableWeight.of(torch.tensor([[2, 0, 3]]), Scales.of(torch.tensor([[2.0]]), "half"), 2, table)
    with forced(level):
        found = table_product(torch.tensor([[1.0, 2.0, 4.0]]), codes, table, w.scales.for_kernel(), 2)
    assert found.tolist() == [[2 * (-1 + 20 + 2)]]
