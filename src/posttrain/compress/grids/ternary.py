"""Sums of ternary planes: with two planes nine values a group, fitted by alternating least squares."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.compress.grids.grid import Grid, Levels
from posttrain.compress.packed.ternary import TernaryWeight
from posttrain.trajectory import PosttrainError

PLANES = 3  # at most: 27 values


@dataclass(frozen=True)
class TernaryLevels(Levels):
    """scale: `[rows, planes]`, as half precision holds it. A code is the number of a choice of trits, see `choices`."""

    scale: Tensor

    def nearest(self, weight: Tensor) -> Tensor:
        return assigned(weight, self.scale)

    def values(self, codes: Tensor) -> Tensor:
        return (self.scale @ choices(self.scale.shape[1]).T.to(self.scale.dtype)).gather(1, codes)


@dataclass(frozen=True)
class TernaryPlanes(Grid):
    r"""`w = sum_k α_k t_k` with trits t_k of -1, 0 or 1 and a scale α_k a plane, row and group.

    Alternates two exact steps: the scales by least squares with a ridge that grows where the system is singular, and
    every weight's trits by looking at all 3^planes. Starts from all planes sign(w). Scales come out in falling order,
    none negative, as half precision holds them; the codes are those that are nearest then.

    bits: planes; each is stored in 1.6 bits a weight. iterations: at most. tolerance: the change of a group's scales,
        as a share of their size, below which it is done. ridge: λ at the start.

    Reference: PTQTP, 2025, arXiv 2509.16989 (card 133).
    """

    bits: int = 2
    group: int = 64
    iterations: int = 50
    tolerance: float = 1e-4
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= PLANES:
            raise PosttrainError(f"bits is {self.bits}; it counts ternary planes, of which there can be 1 to {PLANES}")

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> TernaryLevels:
        scale = alternated(weight, self.bits, self.iterations, self.tolerance, self.ridge, importance=importance)
        return TernaryLevels(scale.clamp(max=65504.0).half().float())

    def pack(self, codes: Tensor, levels: Sequence[Levels], group_of: Tensor | None = None) -> TernaryWeight:
        if group_of is not None:
            raise PosttrainError("ternary planes have groups that are runs of columns; expected static groups")
        scale = torch.stack([each.scale for each in levels if isinstance(each, TernaryLevels)], -1)
        trits = choices(self.bits)[codes.long()]
        return TernaryWeight.of(trits.permute(2, 0, 1), scale.transpose(0, 1))


def choices(planes: int) -> Tensor:
    """`[3**planes, planes]` int64, all choices of trits: those with the fewest that are not 0 first, and of these the
    ones that use the first plane, so that the first of equally good ones is the tie's rule.
    """
    every = itertools.product((-1, 0, 1), repeat=planes)
    return torch.tensor(sorted(every, key=lambda t: (sum(map(abs, t)), [-abs(x) for x in t], t)))


def alternated(
    weight: Tensor,
    planes: int,
    iterations: int = 50,
    tolerance: float = 1e-4,
    ridge: float = 1e-6,
    *,
    start: Tensor | None = None,
    importance: Tensor | None = None,
) -> Tensor:
    """`[rows, planes]` scales of `[rows, n]` weights, in the weights' dtype. start: scales to begin with, in the place
    of planes that are all sign(w). importance: `[n]` or `[rows, n]`, how much each error counts.
    """
    if start is None:
        trits = torch.where(weight >= 0, 1.0, -1.0).to(weight.dtype)[:, None].expand(-1, planes, -1)
        scale = solved(trits, weight, ridge, importance)
    else:
        scale = start.to(weight.dtype).clone()
    going = torch.arange(len(weight), device=weight.device)
    weights = None if importance is None else importance.expand_as(weight)
    table = choices(planes).to(weight.device, weight.dtype)
    for _ in range(iterations):
        rows = weight[going]
        codes = assigned(rows, scale[going])
        trits = table[codes].transpose(1, 2)
        before, now = scale[going], solved(trits, rows, ridge, None if weights is None else weights[going])
        scale[going] = now
        still = (now - before).norm(dim=1) >= tolerance * now.norm(dim=1).clamp(min=1e-30)
        going = going[still]
        if not len(going):
            break
    return canonical(scale)


def assigned(weight: Tensor, scale: Tensor) -> Tensor:
    """`[rows, n]` int64: for each weight the number of the choice of trits that is nearest; ties to the first."""
    values = scale @ choices(scale.shape[1]).T.to(scale.device, scale.dtype)
    least, codes = (weight - values[:, :1]).abs(), torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
    for number in range(1, values.shape[1]):
        error = (weight - values[:, number : number + 1]).abs_()
        better = error < least
        least = torch.minimum(least, error)
        codes.masked_fill_(better, number)
    return codes.long()


def solved(trits: Tensor, weight: Tensor, ridge: float, importance: Tensor | None = None) -> Tensor:
    """`[rows, planes]`: (S^T S + λ I)^-1 S^T w of `[rows, planes, n]` trits, in fp64.

    Where the condition number κ is above 1e12, λ becomes min(λ sqrt(κ / 1e12), 1), once.
    """
    weighted = trits if importance is None else trits * importance.expand_as(weight)[:, None]
    gram = (weighted @ trits.transpose(1, 2)).double()
    right = (weighted.double() @ weight.double()[..., None])[..., 0]
    strength = torch.full((len(weight), 1, 1), ridge, dtype=torch.float64, device=weight.device)
    eye = torch.eye(trits.shape[1], dtype=torch.float64, device=weight.device)
    system = gram + strength * eye
    condition = system.flatten(1).norm(dim=1) * _inverse(system).flatten(1).norm(dim=1)
    worse = (condition / 1e12).sqrt()[:, None, None]
    system = gram + torch.where(worse > 1, (strength * worse).clamp(max=1.0), strength) * eye
    return (_inverse(system) * right[:, None, :]).sum(-1).to(weight.dtype)  # no fused products: see `_inverse`


def _inverse(system: Tensor) -> Tensor:
    """Of symmetric matrices. Those of two rows by the formula, which gives equal planes exactly equal scales."""
    if system.shape[1] != 2:
        return torch.linalg.inv(system)
    a, b, d = system[:, 0, 0], system[:, 0, 1], system[:, 1, 1]
    adjoint = torch.stack([torch.stack([d, -b], -1), torch.stack([-b, a], -1)], -2)
    return adjoint / (a * d - b * b)[:, None, None]


def canonical(scale: Tensor) -> Tensor:
    """The scales that give the same values, none negative and in falling order."""
    return scale.abs().sort(dim=1, descending=True).values
