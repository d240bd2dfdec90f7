"""One linear layer with correlated inputs, and its error by the Hessian: what solvers are compared on."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.compress.moments import InputMoments


def correlated(
    rows: int, columns: int, *, rank: int = 16, tokens: int = 1024, spread: float = 0.5, seed: int = 0
) -> tuple[Tensor, InputMoments]:
    """A weight, and the moments of inputs that are low-rank plus noise, with channels of different sizes."""
    draw = torch.Generator().manual_seed(seed)
    weight = 0.05 * torch.randn(rows, columns, generator=draw)
    inputs = torch.randn(tokens, rank, generator=draw) @ torch.randn(rank, columns, generator=draw)
    inputs = 0.5 * (inputs + torch.randn(tokens, columns, generator=draw))
    inputs *= (spread * torch.randn(columns, generator=draw)).exp()
    return weight, moments_of(inputs)


def moments_of(inputs: Tensor, keep: int = 0) -> InputMoments:
    moments = InputMoments(inputs.shape[1], keep=keep)
    moments.add(inputs)
    return moments


def white(columns: int) -> InputMoments:
    """Inputs whose Hessian is a multiple of the identity."""
    return moments_of(torch.eye(columns))


def loss(weight: Tensor, found: Tensor, moments: InputMoments) -> float:
    """tr(Δ H Δ^T) / tr(W H W^T)."""
    hessian, gap, whole = moments.hessian.double(), (found - weight).double(), weight.double()
    return float(((gap @ hessian) * gap).sum() / ((whole @ hessian) * whole).sum())
