"""Gradient normalisers: what an update's gradient is divided by, where a method says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from posttrain.objective.batch import Batch, Totals
from posttrain.objective.estimator import Objective
from posttrain.objective.likelihood import Likelihood


class Normaliser(Protocol):
    """A second loss, whose gradient's norm decides what the first one's gradient is divided by."""

    def surrogate(self, objective: Objective, batch: Batch, likelihood: Likelihood, totals: Totals) -> Tensor | None:
        """0-d, differentiable: the second loss of a micro-batch; None where it is exactly 0."""
        ...

    def divisor(self, norm: float) -> float:
        """What the gradient is divided by (> 0), from the norm of the second loss's gradient."""
        ...


@dataclass(frozen=True, slots=True)
class ClippingBias:
    r"""Divide by the norm of what clipping took out of the gradient, C(θ), where that is large (S-PPO, card 162):

    .. math:: C = \sum_t z_t\,1[t\ \text{clipped}]\,\rho_t \hat A_t\,\nabla\log\pi_\theta(y_t),\qquad
              \nabla J_{PPO} = \nabla J_{unclipped} - C

    how: `threshold` divides by max(1, norm / threshold), so nothing changes while little is clipped; `triggered`
    divides by max(norm, 0.001) wherever a token is clipped at all.
    """

    threshold: float = 1.0
    how: Literal["threshold", "triggered"] = "threshold"

    def surrogate(self, objective: Objective, batch: Batch, likelihood: Likelihood, totals: Totals) -> Tensor | None:
        weighed = objective.weights(batch, likelihood, totals)
        if bool(weighed.keep.all()):
            return None
        return (weighed.of_score(~weighed.keep) * likelihood.logp).sum()

    def divisor(self, norm: float) -> float:
        if self.how == "threshold":
            return max(1.0, norm / self.threshold)
        return max(norm, 1e-3) if norm > 0 else 1.0
