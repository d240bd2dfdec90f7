"""Whether Triton's kernels multiply some inputs."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from posttrain.trajectory import PosttrainError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST = 1 << 31  # places in a tensor, which the kernels count in 32 bits

_interpreting = False  # set by `interpreted`


def multiplies(inputs: Tensor, *weights: Tensor | None) -> bool:
    """Whether there is a kernel for these inputs: on a CUDA device, with their weights, and nobody wants a gradient."""
    if not (inputs.is_cuda or _interpreting):
        return False
    return (
        inputs.dtype in DTYPES
        and not (inputs.requires_grad and torch.is_grad_enabled())
        and all(w is None or (w.device == inputs.device and w.numel() < MOST) for w in weights)
        and not torch.compiler.is_compiling()
        and there()
    )


@functools.cache
def there() -> bool:
    """Whether Triton is installed; said once where it is missed."""
    found = importlib.util.find_spec("triton") is not None
    if not found:
        warnings.warn(
            "Triton is not installed: packed layers on a GPU work, but slowly; pip install posttrain[triton]",
            stacklevel=3,
        )
    return found


@contextmanager
def interpreted() -> Iterator[None]:
    """Triton's interpreter multiplies what is on the CPU within a `with` block: for tests."""
    global _interpreting
    if os.environ.get("TRITON_INTERPRET") != "1" or not there():
        raise PosttrainError("Triton does not interpret; install it and set TRITON_INTERPRET=1 before it is imported")
    before, _interpreting = _interpreting, True
    try:
        yield
    finally:
        _interpreting = before
