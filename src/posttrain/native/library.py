"""The shared library of the row-wise functions: where it is, what its functions take.

It is plain C, called by `ctypes` with the addresses of tensors; `setup.py` builds it where there is a compiler. Without
it, which is said once, and with `POSTTRAIN_KERNELS=off`, everything is computed by PyTorch, and comes out the same up
to rounding. Other values of the variable are those of the kernels of packed weights.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.native.built import built, missing
from posttrain.trajectory import PosttrainError

BUILT = Path(__file__).parent, "_fused"
VARIABLE = "POSTTRAIN_KERNELS"
LEVELS = ("portable", "avx2", "avx512")  # of the processor; as in the source
SUFFIXES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_SMALL = 1 << 15  # numbers below which a second thread costs more than it brings

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "rms_norm": (_P, _P, _P, _P, _L, _L, _F),
    "rms_norm_back": (_P, _P, _P, _P, _P, _P, _L, _L),
    "gated": (_P, _P, _P, _L, _L),
    "gated_back": (_P, _P, _P, _P, _P, _L, _L),
    "rotated": (_P, _P, _P, _P, _L, _L, _L, _L, _L, _L),
    "attention_weights": (_P, _P, _P, _L, _L, _L, _L, _F),
    "attention_back": (_P, _P, _P, _P, _P, _P, _L, _L, _L, _L, _L, _F),
    "gather": (_P, _P, _P, _L, _L, _L, _L, _L, _L),
    "scatter": (_P, _P, _P, _L, _L, _L, _L),
    "scatter_add": (_P, _P, _P, _L, _L, _L, _L),
    "slot_attention": (*(_P,) * 8, *(_L,) * 13, _F),
    "chosen_attention": (*(_P,) * 8, *(_L,) * 13, _F),
    "log_sum": (_P, _P, _P, _L, _L, _F),
    "logit_gradient": (_P, _P, _P, _P, _L, _L, _F),
    "draw": (_P, _P, _P, _P, _P, _L, _L, _F),
}
_LOW_SIGNATURES: dict[str, tuple[Any, ...]] = {  # of those for bf16 alone
    "transpose": (_P, _P, _L, _L, _L),
    "add": (_P, _P, _L, _L),
}

_enabled = True


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or None where it was not built."""
    for path in built(*BUILT):
        try:
            found = ctypes.CDLL(str(path))
            for level in LEVELS[: int(found.posttrain_fused_level()) + 1]:
                for suffix in SUFFIXES.values():
                    of_both = _SIGNATURES | (_LOW_SIGNATURES if suffix == "bf16" else {})
                    for name, signature in of_both.items():
                        function = getattr(found, f"posttrain_{name}_{suffix}_{level}")
                        function.argtypes, function.restype = (*signature, _I), None
        except (OSError, AttributeError):  # of another machine, or of another version
            continue
        return found
    return None


@functools.cache
def level() -> str | None:
    """The level of the functions that are called; None where there are none, or none are wanted."""
    found, asked = library(), os.environ.get(VARIABLE, "")
    if asked not in ("", "off", *LEVELS):
        raise PosttrainError(f"{VARIABLE} is {asked!r}; expected off, {', '.join(LEVELS)}, or nothing for the best")
    if asked == "off":
        return None
    if found is None:
        why, remedy = missing(built(*BUILT))
        warnings.warn(
            f"posttrain runs without its functions in C ({why}): training and sampling on the CPU are slower; "
            f"{remedy}, or set {VARIABLE}=off to hide this",
            stacklevel=3,
        )
        return None
    best = int(found.posttrain_fused_level())
    if asked and LEVELS.index(asked) > best:
        raise PosttrainError(f"{VARIABLE} is {asked}, but this processor offers {LEVELS[best]} at most")
    return asked or LEVELS[best]


def there_for(*tensors: Tensor) -> bool:
    """Whether the library can take these: all on the CPU, in one dtype, fp32 or bf16."""
    dtype = tensors[0].dtype
    return (
        _enabled
        and dtype in SUFFIXES
        and all(t.dtype is dtype and t.is_cpu for t in tensors)
        and level() is not None
        and not torch.compiler.is_compiling()
    )


@contextmanager
def switched_off() -> Iterator[None]:
    """The plain path inside the block: for tests and measurements."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def threads(numbers: int) -> int:
    """How many threads share a work of that many numbers."""
    return torch.get_num_threads() if numbers >= _SMALL else 1


def call(name: str, dtype: torch.dtype, *arguments: Any, count: int) -> None:
    """Run a function on contiguous tensors and numbers, with `count` threads."""
    function = _function(name, dtype, level())
    function(*[_address(a) if isinstance(a, Tensor) else a for a in arguments], count)


@functools.cache
def _function(name: str, dtype: torch.dtype, level: str | None) -> Callable[..., None]:
    found: Callable[..., None] = getattr(library(), f"posttrain_{name}_{SUFFIXES[dtype]}_{level}")
    return found


def _address(tensor: Tensor) -> int:
    if not tensor.is_contiguous():
        raise ValueError("a row-wise function was given a tensor that is not contiguous")
    return tensor.data_ptr()
