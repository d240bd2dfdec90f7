"""Triton's kernels: equal to the dequantized matrix's products, on a GPU, or under Triton's interpreter without one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_levels import assert_product

from posttrain.compress.kernels.dispatch import FEW, few_rows
from posttrain.compress.kernels.gpu import choice
from posttrain.compress.kernels.gpu.choice import interpreted, multiplies
from posttrain.compress.kernels.library import forced
from posttrain.compress.packed.planes import BinaryWeight
from posttrain.compress.packed.scales import Scales, whole_of
from posttrain.compress.packed.table import TableWeight
from posttrain.compress.packed.ternary import TernaryWeight
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.compress.packed.vector import Books, VectorWeight
from posttrain.compress.packed.weight import PackedWeight
from posttrain.trajectory import PosttrainError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # what Triton reads when it is imported

INSTALLED = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not INSTALLED, reason="Triton is not installed: pip install posttrain[triton]")
ROWS, COLUMNS = 21, 150  # no multiples of the kernels' blocks
WORDS = 2400  # columns whose groups are of whole words, and more than a program goes through at a time
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def triton_runs() -> Iterator[None]:
    with interpreted() if DEVICE == "cpu" else nullcontext():
        yield


def uniform(
    bits: int, kind: Any = "integer", groups: int = 3, ordered: bool = False, columns: int = COLUMNS
) -> UniformWeight:
    codes = torch.randint(0, 1 << bits, (ROWS, columns))
    zero = torch.randint(0, 1 << bits, (ROWS, groups)).float() if kind == "integer" else torch.randn(ROWS, groups) / 9
    group_of = torch.randint(0, groups, (columns,)) if ordered else None
    return UniformWeight.of(codes, torch.rand(ROWS, groups) / 9 + 0.01, zero, bits, kind, group_of)


def table(kind: Any, bits: int = 4, columns: int = COLUMNS) -> TableWeight:
    scale = torch.rand(ROWS, 5 if columns == COLUMNS else 3) + 0.1
    book = "nf4" if bits == 4 else torch.randn(2**bits)
    codes = torch.randint(0, 2**bits, (ROWS, columns))
    return TableWeight.of(codes, Scales.of(scale, kind, whole_of(scale, kind)), bits, book)


def binary(column: bool, groups: int = 2) -> BinaryWeight:
    signs, scale = torch.randint(0, 2, (2, ROWS, COLUMNS)), torch.rand(2, ROWS, groups)
    widths = torch.full((groups,), COLUMNS // groups)
    return BinaryWeight.of(signs, scale, torch.randn(ROWS, groups), widths, torch.rand(COLUMNS) if column else None)


def vector(parts: list[tuple[int, Books]], normal: bool = False) -> VectorWeight:
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
    **{f"uniform, {bits} bits": lambda bits=bits: uniform(bits) for bits in range(1, 9)},
    **{f"uniform, words of {bits} bits": lambda bits=bits: uniform(bits, columns=WORDS) for bits in (1, 2, 4, 8)},
    **{f"uniform, bytes of {bits} bits": lambda bits=bits: uniform(bits, columns=WORDS + 72) for bits in (3, 6)},
    "uniform, words, no zero": lambda: uniform(4, "none", columns=WORDS),
    "uniform, words, float zero": lambda: uniform(2, "float", columns=WORDS),
    "uniform, words, order of activations": lambda: uniform(4, ordered=True, columns=WORDS),
    "table, words": lambda: table("half", columns=WORDS),
    "table, bytes of 6 bits": lambda: table("half", 6, columns=WORDS + 72),
    "uniform, no zero": lambda: uniform(3, "none", 5),
    "uniform, float zero": lambda: uniform(2, "float", 1),
    "uniform, in order of activations": lambda: uniform(4, ordered=True),
    **{
        f"table, {kind} scales": lambda kind=kind: table(kind)
        for kind in ("float", "half", "power", "float8", "double")
    },
    "table of 6 bits": lambda: table("half", 6),
    "ternary": lambda: TernaryWeight.of(torch.randint(-1, 2, (2, ROWS, COLUMNS)), torch.rand(2, ROWS, 3)),
    "ternary, one plane": lambda: TernaryWeight.of(torch.randint(-1, 2, (1, ROWS, COLUMNS)), torch.rand(1, ROWS, 1)),
    "bit planes": lambda: binary(column=False),
    "bit planes, columns": lambda: binary(column=True, groups=1),
    "vector, 6 bits": lambda: vector([(COLUMNS, Books(8, 6))]),
    "vector, 8 and 4 bits": lambda: vector([(COLUMNS, Books(6, 8, 4))], normal=True),
    "vector, 9 and 8 bits": lambda: vector([(COLUMNS, Books(5, 9, 8))]),
    "vector, several parts": lambda: vector([(50, Books(4, 5)), (100, Books(16, 8, 3))]),
}


def seen(module: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels of a module that are launched from now on."""
    found: list[str] = []
    held = importlib.import_module(f"posttrain.compress.kernels.gpu.{module}")
    for name in [n for n in vars(held) if n.endswith("_product") and callable(vars(held)[n]) and n != "_product"]:
        real = getattr(held, name)

        def counted(*given: Any, real: Any = real, name: str = name, **options: Any) -> Any:
            found.append(name)
            return real(*given, **options)

        monkeypatch.setattr(held, name, counted)
    return found


MODULES = {
    "uniform": "_uniform",
    "table": "_table",
    "ternary": "_ternary",
    "bit planes": "_table",
    "vector": "_vectors",
}


@needs_triton
@pytest.mark.parametrize("name", MAKERS)
def test_product_is_that_of_the_dequantized_matrix(
    name: str, triton_runs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    weight = MAKERS[name]().to(DEVICE)
    with forced("off") if DEVICE == "cpu" else nullcontext():
        values = weight.dequantize().cpu()
    module = next(module for kind, module in MODULES.items() if name.startswith(kind))
    launched = seen(module, monkeypatch)
    for count, dtype in ((1, torch.float32), (2, torch.bfloat16), (5, torch.float16)):
        x = torch.randn(count, values.shape[1]).to(dtype)
        found = weight.product(x.to(DEVICE)).cpu()
        assert launched, "the kernel was not taken"
        launched.clear()
        assert (found.shape, found.dtype) == ((count, ROWS), dtype)
        allowed = 4e-6 if dtype != torch.float16 else 1e-3
        assert_product(found, x, values, most=allowed)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_and_gaps(dtype: torch.dtype, triton_runs: None) -> None:
    torch.manual_seed(0)
    weight = uniform(4).to(DEVICE)
    wide = torch.randn(3, 2, COLUMNS + 30, device=DEVICE).to(dtype)
    found = weight.product(wide[..., 7 : 7 + COLUMNS])
    assert found.shape == (3, 2, ROWS)
    again = weight.product(wide[..., 7 : 7 + COLUMNS].contiguous())
    assert torch.equal(found, again)
    assert weight.product(wide[0, 0, :COLUMNS]).shape == (ROWS,)
    assert weight.product(wide[:0, :, :COLUMNS]).shape == (0, 2, ROWS)


@needs_triton
def test_infinities_stay_and_what_is_outside_is_not_read(triton_runs: None) -> None:
    torch.manual_seed(0)
    weight = uniform(3).to(DEVICE)
    x = torch.randn(1, COLUMNS, device=DEVICE)
    x[0, -1] = torch.nan
    assert not weight.product(x).isfinite().any()


@needs_triton
def test_they_are_taken_for_few_rows_that_want_no_gradient(triton_runs: None) -> None:
    weight = uniform(4).to(DEVICE)
    x = torch.randn(FEW, COLUMNS, device=DEVICE)
    assert multiplies(x, weight.codes)
    assert few_rows(x, weight.codes)
    assert not few_rows(torch.cat([x, x]), weight.codes)
    assert not multiplies(x.double(), weight.codes)
    assert not multiplies(x.clone().requires_grad_(), weight.codes)
    assert not multiplies(x, weight.codes.to("meta"))
    huge = torch.empty(1, device=DEVICE).expand(1 << 31)
    assert not multiplies(x, huge), "kernels count in 32 bits"
    many = torch.randn(FEW + 3, COLUMNS, device=DEVICE)
    assert torch.allclose(weight.product(many), many @ weight.dequantize().T, rtol=1e-4, atol=1e-4)


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from posttrain.compress.kernels.gpu import _table, _ternary, _uniform, _vectors

BLOCKS = {"few": 2, "tall": 4, "wide": 128}
for kernel, types, constants in (
    (_uniform._product, {"x": "*bf16", "codes": "*u8", "scale": "*fp16", "zero": "*u8", "group_of": "*i16",
                         "out": "*bf16"}, {"bits": 3, "kind": 1, "ordered": True, **BLOCKS}),
    (_uniform._product_of_units, {"x": "*bf16", "codes": "*i32", "scale": "*fp16", "zero": "*u8", "out": "*bf16"},
     {"bits": 4, "kind": 1, "size": 4, "each": 8, **BLOCKS}),
    (_uniform._product_of_units, {"x": "*bf16", "codes": "*u8", "scale": "*fp16", "zero": "*fp16", "out": "*bf16"},
     {"bits": 3, "kind": 2, "size": 3, "each": 8, **BLOCKS}),
    (_table._product_of_units, {"x": "*fp16", "codes": "*i32", "table": "*fp32", "scale": "*fp16", "out": "*fp16"},
     {"bits": 4, "size": 4, "each": 8, **BLOCKS}),
    (_table._product, {"x": "*fp16", "codes": "*u8", "table": "*fp32", "scale": "*fp16", "out": "*fp16"},
     {"bits": 4, **BLOCKS}),
    (_ternary._product, {"x": "*fp32", "trits": "*u8", "scale": "*fp16", "out": "*fp32"}, {"planes": 2, **BLOCKS}),
    (_vectors._product, {"x": "*fp32", "codes": "*u8", "centroids": "*fp16", "residual": "*fp16", "out": "*fp32"},
     {"length": 6, "first": 9, "rest": 8, "padded": 8, "tall": 4, "wide": 64}),
):
    signature = {n: types.get(n, "constexpr" if n in constants else "i32") for n in kernel.arg_names}
    places = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    made = triton.compile(source, target=GPUTarget("cuda", 80, 32))
    print("cubin" in made.asm)
"""


@needs_triton
def test_they_compile_for_a_gpu(tmp_path: Path) -> None:
    """To the machine code of one, which takes no GPU: the interpreter allows more than the compiler."""
    settings = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    settings.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILED], env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"] * 7


def test_the_cpus_own_inputs_are_none_of_theirs() -> None:
    assert not multiplies(torch.randn(1, 8))


def test_without_triton_it_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    choice.there.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"pip install posttrain\[triton\]"):
            assert not choice.there()
        assert not choice.there()
        with pytest.raises(PosttrainError, match="Triton does not interpret"), interpreted():
            pass
    finally:
        choice.there.cache_clear()
