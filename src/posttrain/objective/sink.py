"""Gradient sinks: where a backward pass may add the gradient of a low-precision parameter straight in fp32.

Autograd hands a gradient on in the parameter's own dtype. For a vocabulary matrix in bf16 that is a product rounded to
bf16, its sum with the embedding's dense gradient (all zeros but for a few rows), and a copy in fp32 for whoever sums
over micro-batches: seven passes over the largest tensor of the model. An optimizer that keeps fp32 gradients opens a
sink for such a parameter instead. A backward function that knows sinks adds its part there and returns None; one that
does not goes on as ever, and the optimizer adds what arrives by autograd to the same sum.

What is added is what autograd would have added, less some roundings. A sink is for `backward()` alone: with
`torch.autograd.grad` a function adds to the sink, too, and autograd sees nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from posttrain.native import library, products

PART = 4096  # rows of a product that are held in low precision at a time, so that they are added from a cache

_open: WeakIdKeyDictionary = WeakIdKeyDictionary()


class GradientSink:
    """Adds to the gradient of an optimizer's fp32 master, which may be None or replaced at any time between passes."""

    def __init__(self, master: Tensor) -> None:
        self.master = master

    def begin(self) -> Tensor:
        """Memory for a gradient where there is none; whoever asks fills it."""
        self.master.grad = torch.empty_like(self.master, requires_grad=False)
        return self.master.grad

    def add_rows(self, index: Tensor, rows: Tensor) -> None:
        """Add `rows` `[n, width]` to the rows `index` `[n]` of the gradient."""
        gradient = self.begin().zero_() if self.master.grad is None else self.master.grad
        gradient.index_add_(0, index, rows.to(gradient.dtype))

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Add `left.T @ right`, of `[n, rows]` and `[n, width]`, to a gradient of `[rows, width]`.

        Each part of the product is rounded to the factors' dtype, as one that autograd hands on is.
        """
        new = self.master.grad is None
        gradient = self.begin() if self.master.grad is None else self.master.grad
        for start in range(0, left.shape[1], PART):
            part = gradient[start : start + PART]
            product = transposed_product(left[:, start : start + PART], right)
            if new:
                part.copy_(product)
            elif _native(product):
                products.add(part, product)  # for which PyTorch makes an fp32 copy of the product
            else:
                part.add_(product)


def transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """`left.T @ right`. Where oneDNN multiplies in bf16 on this CPU, a product is up to twice as fast with a factor
    that is laid out as it is read, so much that a transposed copy pays; on others PyTorch's own product is many times
    slower with such a factor.
    """
    if left.stride(1) == 1 and _native(left, right) and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return products.transposed(left) @ right
    return left.T @ right


def _native(*tensors: Tensor) -> bool:
    return tensors[0].dtype == torch.bfloat16 and library.there_for(*tensors)


def open_sink(parameter: nn.Parameter, master: Tensor) -> None:
    """From now on backward functions may add the parameter's gradient to that of `master`, unless it is on a GPU: there
    rows are added in any order, and a dense gradient costs little.
    """
    if not parameter.is_cuda:
        _open[parameter] = GradientSink(master)


def close_sink(parameter: nn.Parameter, master: Tensor) -> None:
    """From now on its gradient goes the way of autograd alone, unless another master has been given in the meantime."""
    found = sink_of(parameter)
    if found is not None and found.master is master:
        del _open[parameter]


def sink_of(tensor: Tensor) -> GradientSink | None:
    """The sink of a parameter, if one is open for this very tensor."""
    found: GradientSink | None = _open.get(tensor)
    return found
