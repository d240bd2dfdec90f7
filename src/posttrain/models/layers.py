"""Norms and gated units of a model computed by the row-wise functions, where they compute what those do; and layers
whose gradients go straight to the optimizer.

`transformers` writes the former in many operations of PyTorch, each of which reads and writes memory once more. Which
modules they can stand in for is found by trying, not by names: a class is taken if its output on drawn input agrees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.models.sink_layers import looked_up, projected, takes_product, takes_rows
from posttrain.native import layers, library

Forward = Callable[[Tensor], Tensor]
AGREES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative to the largest output


def replacements(model: nn.Module) -> list[tuple[nn.Module, Forward]]:
    """The modules of a model on the CPU that the row-wise functions can stand in for, each with its other forward."""
    weights = next(model.parameters(), None)
    if weights is None or not library.there_for(weights):
        return []
    agreeing: dict[tuple[Any, ...], bool] = {}
    found: list[tuple[nn.Module, Forward]] = []
    for module in model.modules():
        if "forward" in module.__dict__:  # someone else's already
            continue
        other = _norm(module) or _gated_unit(module) or _sinking(module)
        if other is None:
            continue
        one = id(module) if isinstance(module, nn.Embedding) else 0  # each may have a scale of its own
        kind = (type(module), str(getattr(module, "act_fn", "")), one)
        if kind not in agreeing:
            agreeing[kind] = _agree(module, other)
        if agreeing[kind]:
            found.append((module, other))
    return found


@contextmanager
def replaced(found: list[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Those forwards inside the block, the modules' own outside."""
    mine = [(module, other) for module, other in found if "forward" not in module.__dict__]
    for module, other in mine:
        module.forward = other
    try:
        yield
    finally:
        for module, _ in mine:
            del module.forward


def _norm(module: nn.Module) -> Forward | None:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    named = type(module).__name__.endswith("RMSNorm")
    if not named or not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(eps, float):
        return None
    return partial(_norm_forward, module, eps)


def _norm_forward(module: nn.Module, eps: float, hidden: Tensor) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    if not library.there_for(hidden, weight):
        return type(module).forward(module, hidden)
    return layers.rms_norm(hidden, weight, eps)


def _gated_unit(module: nn.Module) -> Forward | None:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")]
    if not all(isinstance(part, nn.Module) for part in parts) or "silu" not in type(parts[-1]).__name__.lower():
        return None
    return partial(_gated_forward, module)


def _gated_forward(module: Any, hidden: Tensor) -> Tensor:
    gate, up = module.gate_proj(hidden), module.up_proj(hidden)
    if not library.there_for(gate, up):
        return module.down_proj(module.act_fn(gate) * up)
    return module.down_proj(layers.gated(gate, up))


def _sinking(module: nn.Module) -> Forward | None:
    if takes_product(module):
        return partial(projected, module)  # type: ignore[arg-type]
    return partial(looked_up, module) if takes_rows(module) else None  # type: ignore[arg-type]


@torch.no_grad()
def _agree(module: nn.Module, other: Forward) -> bool:
    """Whether both forwards give the same on drawn input, up to rounding."""
    weight = next(module.parameters(), None)  # a unit of packed layers has none
    width = _width(module)
    if weight is None or width is None or not weight.is_floating_point() or weight.dtype not in AGREES:
        return False
    draw = torch.Generator().manual_seed(0)
    if isinstance(module, nn.Embedding):
        inputs = torch.randint(0, len(weight), (1, 3), generator=draw)
    else:
        inputs = torch.randn(1, 3, width, generator=draw).to(weight)
    try:
        own, made = type(module).forward(module, inputs).float(), other(inputs).float()
    except (RuntimeError, TypeError, ValueError):
        return False  # it takes other inputs than a row of numbers: no twin of these functions
    return bool((own - made).abs().max() <= AGREES[weight.dtype] * own.abs().max())


def _width(module: nn.Module) -> int | None:
    gate, weight = getattr(module, "gate_proj", None), getattr(module, "weight", None)
    if gate is None:
        return weight.shape[-1] if isinstance(weight, Tensor) else None
    found = getattr(gate, "in_features", None)
    return int(found) if found is not None else None
