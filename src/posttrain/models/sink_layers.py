"""Layers whose weights' gradients go straight into open sinks: of a table of embeddings the rows of the tokens, never a
dense matrix; of a linear layer a product that is faster on CPUs than the one PyTorch takes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from posttrain.objective.sink import sink_of, transposed_product


def takes_rows(module: nn.Module) -> bool:
    """Whether a module is a table of embeddings whose optimizer has opened a sink for it, and which does no more in its
    backward pass than to add up rows.
    """
    return (
        isinstance(module, nn.Embedding)
        and sink_of(module.weight) is not None
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
    )


def looked_up(module: nn.Embedding, tokens: Tensor) -> Tensor:
    """`[..., width]` rows of the table for int64 tokens `[...]`."""
    if sink_of(module.weight) is None:
        found: Tensor = type(module).forward(module, tokens)
    else:
        found = _Lookup.apply(tokens, module.weight, module.padding_idx)
    return found


def takes_product(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer without a bias whose optimizer has opened a sink for its weight."""
    return type(module) is nn.Linear and module.bias is None and sink_of(module.weight) is not None


def projected(module: nn.Linear, inputs: Tensor) -> Tensor:
    """`[..., out]` from `[..., in]`."""
    if sink_of(module.weight) is None or not torch.is_grad_enabled():
        found: Tensor = type(module).forward(module, inputs)
    else:
        found = _Projection.apply(inputs, module.weight)
    return found


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return F.linear(inputs, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Any, ...]:
        inputs, weight = ctx.saved_tensors
        of_inputs, of_weight = ctx.needs_input_grad
        d_inputs = given @ weight if of_inputs else None
        if not of_weight:
            return d_inputs, None
        rows, x = given.reshape(-1, given.shape[-1]), inputs.reshape(-1, inputs.shape[-1])
        sink = sink_of(weight)
        if sink is None:  # it was closed since
            return d_inputs, transposed_product(rows, x)
        sink.add_product(rows, x)
        return d_inputs, None


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        ctx.padding = padding
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Any, ...]:
        tokens, weight = ctx.saved_tensors
        sink = sink_of(weight)
        if sink is None:  # it was closed since
            padding = -1 if ctx.padding is None else ctx.padding
            dense = torch.ops.aten.embedding_dense_backward(given, tokens, len(weight), padding, False)
            return None, dense, None
        rows = given.reshape(-1, given.shape[-1])
        if ctx.padding is not None:  # that token is to have no gradient
            rows = rows.masked_fill((tokens == ctx.padding).view(-1, 1), 0)
        sink.add_rows(tokens.flatten(), rows)
        return None, None, None
