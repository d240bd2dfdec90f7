"""Linear layers in bf16 whose weights lie in the order in which oneDNN reads them, for the decode steps of a call.

oneDNN brings a weight into that order before every product, which for the few rows of a decode step takes as long as
the product. Done once, it pays after some ten steps. A copy in that order takes as much memory as the weight, so it is
made in a block and dropped with it; and it is used only while nothing has been written to the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.models.layers import Forward, replaced
from posttrain.objective.logprob import Head

FEW = 256  # rows of a product up to which the order of the weight tells
STEPS = 12  # decode steps after which the copies have paid: packing a model costs as much as ten save at 64 rows
BYTES = 2 << 30  # of all copies at most; further layers stay as they are


@contextmanager
def packed_linears(model: nn.Module, head: Head, steps: float) -> Iterator[Head]:
    """Inside the block the linear layers of a decoder, and the head that is yielded, use packed weights where a call of
    so many decode steps gains by it. Weights are packed when they are first used for few rows.
    """
    packs = {id(w): PackedWeight(w) for w in weights_to_pack(model, head, steps)}
    found: list[tuple[nn.Module, Forward]] = [
        (module, partial(_forward, module, packs[id(module.weight)]))
        for module in _linears(model)
        if id(module.weight) in packs
    ]
    with replaced(found):
        yield replace(head, packed=packs[id(head.weight)]) if id(head.weight) in packs else head


def weights_to_pack(model: nn.Module, head: Head, steps: float, device: str = "cpu") -> list[Tensor]:
    """The weights of which a call of so many decode steps makes copies: of linear layers, each once, and of the head,
    as far as there is room. device: where they lie, which is `meta` for what only stands for a model on the CPU.
    """
    if steps < STEPS or not available():
        return []
    room = BYTES
    found: dict[int, Tensor] = {}
    for weight in (*(module.weight for module in _linears(model)), head.weight):
        if id(weight) not in found and takes(weight, device) and weight.nbytes <= room:
            room -= weight.nbytes
            found[id(weight)] = weight
    return list(found.values())


def _linears(model: nn.Module) -> Iterator[nn.Linear]:
    """Those that compute as a plain one does."""
    return (m for m in model.modules() if type(m) is nn.Linear and "forward" not in m.__dict__)


def _forward(module: Any, pack: PackedWeight, inputs: Tensor) -> Tensor:
    if module.weight is pack.weight:
        return pack.product(inputs, module.bias)
    found: Tensor = type(module).forward(module, inputs)
    return found


class PackedWeight:
    """A weight `[out, in]` in bf16 and, from the first use on, its copy in oneDNN's order."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._state = (weight._version, weight.data_ptr())
        self._copy: Tensor | None = None

    def product(self, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        """`inputs @ weight.T + bias`: bf16 `[..., in]` to `[..., out]`. By the plain product where there are many rows,
        a gradient is to be had, or the weight has been written to since.
        """
        weight = self.weight
        few = 0 < inputs.numel() <= FEW * weight.shape[1]
        written = (weight._version, weight.data_ptr()) != self._state
        if not few or written or torch.is_grad_enabled() or inputs.dtype != weight.dtype:
            return F.linear(inputs, weight, bias)
        if self._copy is None:
            self._copy = _packed(weight)
        return _product(inputs, self._copy, bias)


def takes(weight: Tensor, device: str = "cpu") -> bool:
    """Whether a weight can be packed: plain, bf16, on the CPU, with a count of what is written to it."""
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.device.type == device
        and weight.dtype == torch.bfloat16
        and weight.ndim == 2
        and weight.is_contiguous()
        and not weight.is_inference()
    )


def available() -> bool:
    """Whether this PyTorch on this processor has products with packed weights, and they are right."""
    return bool(torch.backends.mkldnn.enabled) and _works()


@cache
@torch.no_grad()
def _works() -> bool:
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=draw).bfloat16() for shape in ((3, 40), (24, 40), (24,)))
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        found, wanted = _product(x, _packed(weight), bias).float(), F.linear(x, weight, bias).float()
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):  # another version, or built without oneDNN
        return False
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= 2e-2 * wanted.abs().max())


def _packed(weight: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return found


def _product(inputs: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise.default(inputs, packed, bias, "none", [], "")
    return found
