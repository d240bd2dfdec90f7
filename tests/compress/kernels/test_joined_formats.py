"""Packed formats that have kernels: their products are those of the dequantized matrix, with few rows and with many."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_levels import assert_product, needs_kernels

from posttrain.compress.kernels.dispatch import FEW
from posttrain.compress.kernels.library import forced
from posttrain.compress.packed.planes import BinaryWeight
from posttrain.compress.packed.scales import Scales, whole_of
from posttrain.compress.packed.table import TableWeight
from posttrain.compress.packed.ternary import TernaryWeight
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.compress.packed.vector import Books, VectorWeight
from posttrain.compress.packed.weight import PackedWeight

ROWS, COLUMNS = 24, 128


def uniform(kind: str, ordered: bool = False) -> UniformWeight:
    group_of = torch.arange(COLUMNS).flip(0) // 64 if ordered else None
    zero = torch.randint(0, 8, (ROWS, 2)).float() if kind == "integer" else torch.randn(ROWS, 2)
    return UniformWeight.of(torch.randint(0, 8, (ROWS, COLUMNS)), torch.rand(ROWS, 2), zero, 3, kind, group_of)


def table(kind: str, bits: int = 4) -> TableWeight:
    scale = torch.rand(ROWS, 4) + 0.1
    scales = Scales.of(scale, kind, whole_of(scale, kind))
    book = "nf4" if bits == 4 else torch.randn(2**bits)
    return TableWeight.of(torch.randint(0, 2**bits, (ROWS, COLUMNS)), scales, bits, book)


def binary(widths: list[int], column: bool) -> BinaryWeight:
    groups = len(widths)
    signs, scale = torch.randint(0, 2, (2, ROWS, COLUMNS)), torch.rand(2, ROWS, groups)
    factor = torch.rand(COLUMNS) if column else None
    return BinaryWeight.of(signs, scale, torch.randn(ROWS, groups), torch.tensor(widths), factor)


def vector(parts: list[tuple[int, Books]], normal: bool) -> VectorWeight:
    made = [
        (
            books,
            torch.randint(0, 2**books.index_bits, (-(-ROWS // books.length), columns)),
            torch.randn(2**books.first, books.length),
            torch.randn(2**books.residual, books.length) if books.residual else None,
        )
        for columns, books in parts
    ]
    order = torch.randperm(COLUMNS) if len(parts) > 1 else None
    return VectorWeight.of(ROWS, made, order, (torch.rand(COLUMNS), torch.randn(COLUMNS)) if normal else None)


MAKERS: dict[str, Callable[[], PackedWeight]] = {
    **{f"uniform, {kind} zero": lambda kind=kind: uniform(kind) for kind in ("none", "integer", "float")},
    "uniform, in order of activations": lambda: uniform("integer", ordered=True),
    **{
        f"table, {kind} scales": lambda kind=kind: table(kind)
        for kind in ("float", "half", "power", "float8", "double")
    },
    "table of 6 bits": lambda: table("half", 6),
    "ternary": lambda: TernaryWeight.of(torch.randint(-1, 2, (2, ROWS, COLUMNS)), torch.rand(2, ROWS, 2)),
    "binary": lambda: binary([64, 64], column=True),
    "binary, one group": lambda: binary([128], column=False),
    "binary, unequal groups": lambda: binary([100, 28], column=False),
    "vector": lambda: vector([(COLUMNS, Books(6, 9))], normal=True),
    "vector, several parts": lambda: vector(
        [(28, Books(4, 5)), (50, Books(8, 8, 4)), (50, Books(8, 10))], normal=False
    ),
    "vector, too long": lambda: vector([(COLUMNS, Books(20, 4))], normal=False),
}


@needs_kernels
@pytest.mark.parametrize("name", MAKERS)
def test_product_is_that_of_the_dequantized_matrix(name):
    torch.manual_seed(0)
    weight = MAKERS[name]()
    with forced("off"):
        values = weight.dequantize()
    for shape in ((COLUMNS,), (3, COLUMNS), (2, 2, COLUMNS), (FEW + 5, COLUMNS), (0, COLUMNS)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape).to(dtype)
            found = weight.product(x)
            assert found.shape == (*shape[:-1], ROWS)
            assert found.dtype == dtype
            # with many rows values are rounded to bf16, too
            several = dtype == torch.bfloat16 and x.numel() > FEW * COLUMNS
            assert_product(found, x, values, most=1e-3 if several or "long" in name or "unequal" in name else 4e-6)


@needs_kernels
def test_inputs_of_the_wrong_width_are_refused():
    for name in ("uniform, none zero", "ternary", "table, half scales"):
        with pytest.raises((ValueError, RuntimeError)):
            MAKERS[name]().product(torch.randn(2, COLUMNS - 8))
