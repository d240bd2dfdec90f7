r"""The policy's own probability, shaped in the light of the advantage: a denominator for tokens that another wrote.

Such tokens have no ratio to a policy that sampled them. Beside `Shaped` (off_policy.py), which is blind to the sign.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from posttrain.objective.batch import Batch
from posttrain.objective.denominator import Ratio

Shape = Callable[[Tensor, Tensor], Tensor]  # probability `[M]`, advantage `[M]` -> weight `[M]`, differentiable


@dataclass(frozen=True)
class LearnRareAvoidLikely:
    r"""What is to be learned counts most where it is rare; what is to be avoided, as far as the policy would say it.

    .. math:: w(p, A) = \begin{cases} p / (p + c) & A > 0\\ p & A \le 0\end{cases}

    For A > 0 the gradient's weight :math:`\partial w/\partial\log p = pc/(p+c)^2` is largest, 1/4, at p = c.
    """

    c: float = 0.1

    def __call__(self, probability: Tensor, advantage: Tensor) -> Tensor:
        return torch.where(advantage > 0, probability / (probability + self.c), probability)


@dataclass(frozen=True)
class AdvantageShaped:
    r""":math:`w(\pi_\theta, \hat A)` in the ratio's place, for any elementwise differentiable `shape`; never clipped.

    The gradient's weight is :math:`\partial w/\partial\log\pi_\theta`, by autograd. The advantage must be one that is
    set before the update.
    """

    shape: Shape = field(default_factory=LearnRareAvoidLikely)

    def __call__(self, batch: Batch, logp: Tensor) -> Ratio:
        if batch.advantage is None:
            raise RuntimeError("a shape that looks at the advantage needs one that is set before the update")
        with torch.enable_grad():  # also where a loss is only measured
            own = logp.detach().clone().requires_grad_()
            weight = self.shape(own.exp(), batch.advantage.to(logp))
            (slope,) = torch.autograd.grad(weight.sum(), own)
        return Ratio(slope, weight.detach(), torch.zeros_like(slope))
