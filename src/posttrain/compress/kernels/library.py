"""The shared library of the kernels: where it is, which level of the processor it uses, what its functions take.

It is plain C, called by `ctypes` with the addresses of tensors; `setup.py` builds it where there is a compiler. Without
it everything works in PyTorch, more slowly, and says so once.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.native.built import built, missing
from posttrain.reward.names import unknown
from posttrain.trajectory import PosttrainError

BUILT = Path(__file__).parent, "_native"
VARIABLE = "POSTTRAIN_KERNELS"
OFF = "off"
LEVELS = ("portable", "avx2", "avx512")  # each contains those before it; as in native.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_SMALL = 1 << 18  # weights below which a second thread costs more than it brings

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_UNIFORM = (_P, _P, _P, _P, _L, _L, _L, _I, _I)
_TABLE = (_P, _P, _P, _I, _P, _P, _F, _L, _L, _L, _I)
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "uniform_product": (*_UNIFORM, _P, _I, _L, _L, _P),
    "uniform_values": (*_UNIFORM, _L, _L, _P, _I),
    "table_product": (*_TABLE, _P, _I, _L, _L, _P),
    "table_values": (*_TABLE, _L, _L, _P, _I),
    "integer_product": (_P, _P, _P, _L, _L, _L, _I, _I, _I, _P, _P, _L, _P),
    "plane_product": (_P, _P, _P, _L, _L, _L, _I, _I, _P, _I, _P, _P, _L, _P),
    "planes": (_P, _L, _L, _I, _P),
    "ternary_product": (_P, _P, _I, _L, _L, _L, _P, _I, _L, _L, _P),
    "nearest": (_P, _P, _L, _L, _L, _P),
    "vector_product": (_P, _P, _P, _L, _L, _I, _I, _I, _P, _L, _P),
}
_SERIAL = ("planes",)  # take a level, but no threads

_chosen: int | None = None  # a level set by `forced`


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or None where it was not built."""
    for path in built(*BUILT):
        try:
            found = ctypes.CDLL(str(path))
            for name, signature in _SIGNATURES.items():
                function = getattr(found, f"posttrain_{name}")
                function.argtypes = (*signature, _I) if name in _SERIAL else (*signature, _I, _I)
        except (OSError, AttributeError):  # of another machine, or of another version
            continue
        return found
    return None


@functools.cache
def best_level() -> int:
    """The highest level of the processor that the environment allows; -1 where kernels are off or were not built."""
    asked = os.environ.get(VARIABLE, "")
    if asked and asked != OFF and asked not in LEVELS:
        raise unknown(f"level in {VARIABLE}", asked, (OFF, *LEVELS))
    if asked == OFF:
        return -1
    found = library()
    if found is None:
        why, remedy = missing(built(*BUILT))
        if asked:
            raise PosttrainError(f"{VARIABLE} is {asked}, but posttrain has no CPU kernels ({why}); {remedy}")
        warnings.warn(
            f"posttrain runs without its CPU kernels ({why}): packed layers work, but slowly; {remedy}, or set "
            f"{VARIABLE}=off to hide this",
            stacklevel=3,
        )
        return -1
    supported = int(found.posttrain_level())
    if not asked:
        return supported
    if LEVELS.index(asked) > supported:
        raise PosttrainError(f"{VARIABLE} is {asked}, but this processor offers {LEVELS[supported]} at most")
    return LEVELS.index(asked)


def level() -> int:
    """The level that kernels run at now; -1 where there are none."""
    return best_level() if _chosen is None else _chosen


def offered() -> tuple[str, ...]:
    """The levels that this processor and installation offer."""
    found = library()
    return () if found is None else LEVELS[: int(found.posttrain_level()) + 1]


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Kernels of one level, or `off`, within a `with` block: for tests and measurements."""
    global _chosen
    if name != OFF and name not in offered():
        raise PosttrainError(f"level {name!r} of the kernels; this machine offers {', '.join(offered()) or 'none'}")
    before, _chosen = _chosen, -1 if name == OFF else LEVELS.index(name)
    try:
        yield
    finally:
        _chosen = before


def there_for(*weights: Tensor | None) -> bool:
    """Whether there are kernels for weights at this place."""
    for weight in weights:
        if weight is not None and not weight.is_cpu:
            return False
    return level() >= 0 and not torch.compiler.is_compiling()


def runs_on(inputs: Tensor, *weights: Tensor | None) -> bool:
    """Whether there is a kernel for these inputs: on the CPU, fp32 or bf16, and nobody wants a gradient of them."""
    return (
        inputs.is_cpu
        and inputs.dtype in DTYPES
        and not (inputs.requires_grad and torch.is_grad_enabled())
        and there_for(*weights)
    )


def call(name: str, *arguments: Any, work: int) -> None:
    """Run a kernel at the level of now. work: weights it goes through, which decides whether threads share it."""
    kernel, at = _kernel(name), level()
    if at < 0:
        at = len(offered()) - 1
    if name in _SERIAL:
        failed = kernel(*arguments, at)
    else:
        failed = kernel(*arguments, at, torch.get_num_threads() if work >= _SMALL else 1)
    if failed:
        raise MemoryError(f"kernel {name}") if failed == 1 else PosttrainError(f"kernel {name} does not do this shape")


@functools.cache
def _kernel(name: str) -> Any:
    found = library()
    if found is None:
        why, remedy = missing(built(*BUILT))
        raise PosttrainError(f"posttrain has no CPU kernels ({why}); {remedy}")
    return getattr(found, f"posttrain_{name}")


def mismatch(what: str) -> ValueError:
    """A kernel reads memory without asking: shapes that do not fit together must not reach it."""
    return ValueError(f"a kernel was given {what}")


def address(tensor: Tensor | None) -> int | None:
    """Where a contiguous tensor begins."""
    if tensor is None:
        return None
    if not tensor.is_contiguous():
        raise mismatch("a tensor that is not contiguous")
    return tensor.data_ptr()
