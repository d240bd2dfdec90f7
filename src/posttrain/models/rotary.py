"""Rotary positions of a model computed by the row-wise function, where its own function computes the same.

In `transformers` they are a function of the module that a model's classes stand in, which its attention calls by name:
two products, a negation, a concatenation and a sum for queries and keys each, and as much in the backward pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.native import layers, library

NAME = "apply_rotary_pos_emb"
AGREES = 1e-5  # relative to the largest output, in fp32
Rotation = Callable[..., tuple[Tensor, Tensor]]
Rotations = list[tuple[Any, Rotation]]


def rotations(model: nn.Module) -> Rotations:
    """The Python modules of a model on the CPU whose function can be replaced, each with what replaces it."""
    weights = next(model.parameters(), None)
    if weights is None or not library.there_for(weights):
        return []
    homes = {type(module).__module__ for module in model.modules()}
    found: Rotations = []
    for home in sorted(homes):
        own = getattr(sys.modules.get(home), NAME, None)
        if own is not None and not isinstance(own, partial) and _agrees(own):
            found.append((sys.modules[home], partial(_rotate, own)))
    return found


@contextmanager
def rotating(found: Rotations) -> Iterator[None]:
    """Those functions inside the block, the modules' own outside; who comes second finds them there and leaves them."""
    mine = [(home, getattr(home, NAME), other) for home, other in found if not isinstance(getattr(home, NAME), partial)]
    for home, _, other in mine:
        setattr(home, NAME, other)
    try:
        yield
    finally:
        for home, own, _ in mine:
            setattr(home, NAME, own)


def _rotate(own: Rotation, q: Any, k: Any, cos: Any, sin: Any, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
    given = (q, k, cos, sin)
    if rest or options or not all(isinstance(t, Tensor) for t in given):
        return own(q, k, cos, sin, *rest, **options)
    if _takes(*given):
        return layers.rotated(q, cos, sin), layers.rotated(k, cos, sin)
    if _takes_step(*given):  # rows stand where the tokens of one row would
        cos, sin = cos.transpose(0, 1), sin.transpose(0, 1)
        q, k = (layers.rotated(x.transpose(0, 2), cos, sin).transpose(0, 2) for x in (q, k))
        return q, k
    return own(q, k, cos, sin)


def _takes(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether they are `[1, heads, N, width]` twice and constant `[1, N, width]` twice."""
    return (
        library.there_for(q, k, cos, sin)
        and q.ndim == k.ndim == 4
        and not (cos.requires_grad or sin.requires_grad)
        and q.shape[3] % 2 == 0
        and all(len(x) == 1 and x.shape[2:] == cos.shape[1:] == sin.shape[1:] for x in (q, k))
        and len(cos) == len(sin) == 1
    )


def _takes_step(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether they are those of a decode step: `[rows, heads, 1, width]` twice and `[rows, 1, width]` twice."""
    if not q.ndim == k.ndim == 4 or not cos.ndim == sin.ndim == 3 or not q.shape[2] == k.shape[2] == cos.shape[1] == 1:
        return False
    return _takes(q.transpose(0, 2), k.transpose(0, 2), cos.transpose(0, 1), sin.transpose(0, 1))


@cache
def _agrees(own: Rotation) -> bool:
    """Whether a model's function gives the same on drawn input, up to rounding."""
    draw = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(1, *shape, generator=draw) for shape in ((4, 3, 8), (2, 3, 8), (3, 8), (3, 8)))
    try:
        wanted, found = own(q, k, cos, sin), _rotate(own, q, k, cos, sin)
    except (RuntimeError, TypeError, ValueError):
        return False  # it takes other arguments
    return all(
        a.shape == b.shape and bool((a - b).abs().max() <= AGREES * b.abs().max())
        for a, b in zip(found, wanted, strict=True)
    )
