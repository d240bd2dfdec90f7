"""The kernels of a rehearsal: on tensors without memory, what those of a device would keep and allocate.

Which kernel computes depends on the device, and a `meta` tensor is on none. What is the trainer's own code runs as it
is: grouped products for short segments, the row-wise functions around their C. A tiled kernel, which never holds the
scores, stands for what PyTorch calls elsewhere (`scaled_dot_product_attention`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.models import attention, layers
from posttrain.models.grouped_attention import GroupedAttention
from posttrain.native import chosen, gather, library, products, slots, softmax
from posttrain.native import layers as rowwise
from posttrain.objective import logprob
from posttrain.plan.ledger import Ledger
from posttrain.training import optim

BACKWARD = 2.5  # operations of a tiled backward pass per operation of the forward pass: five products in place of two


@contextmanager
def kernels(device: str, ledger: Ledger) -> Iterator[None]:
    """Inside, packed rows of `meta` tensors are computed by what a device (cpu or cuda) has: its attention, and on the
    CPU the row-wise functions in C, which allocate what they do on real tensors and then compute nothing.
    """
    with ExitStack() as stack:
        _put(stack, attention, "attend", partial(_attend, attention.attend, device, ledger))
        _put(stack, logprob, "on_gpu", lambda weight: weight.is_cuda or (weight.is_meta and device != "cpu"))
        if device == "cpu":
            _put(stack, library, "there_for", partial(_there_for, library.there_for))
            _put(stack, layers, "_agree", partial(_agree, layers._agree))
            for module in (rowwise, softmax, products, gather, slots, chosen):
                _put(stack, module, "call", partial(_call, module.call))
        else:
            _put(stack, optim, "open_sink", lambda *_: None)  # as there is none on a GPU
        yield


def _put(stack: ExitStack, module: Any, name: str, function: Callable[..., Any]) -> None:
    stack.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, function)


def _attend(
    plain: Callable[..., Tensor], device: str, ledger: Ledger, q: Tensor, k: Tensor, v: Tensor, mask: Tensor,
    scale: float, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    if q.device.type != "meta" or softcap is not None:
        return plain(q, k, v, mask, scale, softcap)
    if device == "cpu" and k.shape[2] < attention.LONG:
        found: Tensor = GroupedAttention.apply(q, k, v, mask, scale)
    else:
        found = _Tiled.apply(q, k, v, mask, ledger)
    return found


def _there_for(plain: Callable[..., bool], *tensors: Tensor) -> bool:
    """Whether the row-wise functions would take such tensors if they were real: asked of empty ones."""
    if any(t.device.type != "meta" for t in tensors):
        return plain(*tensors)
    return plain(*(torch.empty(0, dtype=t.dtype) for t in tensors))


def _call(plain: Callable[..., None], name: str, dtype: torch.dtype, *arguments: Any, count: int) -> None:
    if not any(isinstance(a, Tensor) and a.device.type == "meta" for a in arguments):
        plain(name, dtype, *arguments, count=count)


def _agree(plain: Callable[..., bool], module: nn.Module, other: Any) -> bool:
    """Norms are tried on real numbers, since some of that name compute something else; gated units are all alike, as
    are linear layers and tables of embeddings that are not scaled.
    """
    weight = next(module.parameters())
    if weight.device.type != "meta":
        return plain(module, other)
    if isinstance(module, nn.Embedding | nn.Linear):
        return type(module).forward in (nn.Embedding.forward, nn.Linear.forward)
    if hasattr(module, "gate_proj"):
        return True
    real = copy.deepcopy(module).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in real.parameters():
            parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel()).view_as(parameter))
    tried = layers._norm(real)
    return tried is not None and plain(real, tried)


class _Tiled(torch.autograd.Function):
    """Keeps queries, keys, values, the mask as numbers, the output and a normaliser a query; no scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, ledger: Ledger) -> Tensor:
        out = q.new_empty(*q.shape[:3], v.shape[-1])
        normaliser = q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, mask.to(q.dtype), out, normaliser)
        ctx.ledger, ctx.work = ledger, 2.0 * q.numel() // q.shape[-1] * k.shape[2] * (q.shape[-1] + v.shape[-1])
        ledger.worked(ctx.work)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, *_ = ctx.saved_tensors
        ctx.ledger.worked(BACKWARD * ctx.work)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None, None
