r"""Elliptical novelty: how far a completion's representation points where the others' do not.

.. math:: b_i = v_i^\top \Big(\lambda I + \sum_j v_j v_j^\top\Big)^{-1} v_i \in [0, 1)

The bonus of linear bandits (the leverage of ridge regression). Everything is computed in float64: with few completions
and many dimensions the differences between the b are small.
Reference: Representation-Based Exploration for Language Models, 2025, arXiv 2510.11686 (card 135).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def elliptical_bonus(features: Tensor, ridge: float, *, centre: bool = True) -> Tensor:
    """`[n, d]` features to `[n]` float64 bonuses against all n, the own included.

    ridge: λ > 0, in the features' squared unit. Where it is small beside their spread and n - 1 <= d, every distinct
    completion has about (n - 1)/n and the bonus says nothing. centre: subtract the mean first.
    """
    v = features.double()
    if centre:
        v = v - v.mean(0)
    gram = v @ v.T
    # [K (K + ridge I)^-1]_ii is the same number by a system of n in the place of d
    return torch.linalg.solve(gram + ridge * torch.eye(len(v), dtype=v.dtype, device=v.device), gram).diagonal()


def sparse_projection(width: int, dimensions: int, chance: np.random.Generator) -> Tensor:
    r"""A `[dimensions, width]` fp32 random projection: entries :math:`\pm\sqrt{s/d}`, 0 with probability 1 - 1/s.

    s is the square root of the width (Li, Hastie and Church, 2006). Lengths are kept on average.
    """
    s = width**0.5
    sign = np.where(chance.random((dimensions, width)) < 0.5, -1.0, 1.0)
    kept = chance.random((dimensions, width)) < 1 / s
    return torch.from_numpy((sign * kept * (s / dimensions) ** 0.5).astype(np.float32))


def novelty_order(features: Tensor, ridge: float, *, centre: bool = True, first: int | None = None) -> list[int]:
    """The rows of `[n, d]` features in the order in which each is the most novel beside those before it.

    ridge: λ > 0. centre: subtract the pool's mean first, for hidden states have a large common part.
    first: the row to begin with; by default the longest. Of equally novel rows the first one goes first.
    """
    v = features.double()
    if centre:
        v = v - v.mean(0)
    inverse = torch.eye(v.shape[1], dtype=v.dtype, device=v.device) / ridge
    order: list[int] = []
    left = torch.ones(len(v), dtype=torch.bool, device=v.device)
    while len(order) < len(v):
        novelty = ((v @ inverse) * v).sum(1).masked_fill(~left, -1.0)
        chosen = first if first is not None and not order else int(novelty.argmax())
        order.append(chosen)
        left[chosen] = False
        inverse = sherman_morrison(inverse, v[chosen])
    return order


def sherman_morrison(inverse: Tensor, v: Tensor) -> Tensor:
    """The inverse of A + v vᵀ from the inverse of a symmetric A, `[d, d]`."""
    step = inverse @ v
    return inverse - torch.outer(step, step) / (1 + v @ step)
