r"""A teacher's judgement of the policy's own tokens: credit and divergence from :math:`R = \log\pi_T - \log\pi_\theta`.

Both read `batch.teacher_logp`, the teacher's log-probabilities of the tokens that the policy sampled: teacher and
policy share a tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from posttrain.objective.advantage import Credit
from posttrain.objective.batch import Batch
from posttrain.objective.divergence import Need
from posttrain.objective.imitation import succeeded
from posttrain.objective.likelihood import Likelihood
from posttrain.objective.schedule import Coefficient

BOUND = 10.0  # nats: a token that a teacher finds impossible (log-probability -30) must not outweigh all others
SOLVED = "solved"  # the fact that says how many completions of a group are right (reward/shapings/solved.py)


def log_ratio(batch: Batch, logp: Tensor) -> Tensor:
    """R of each token, `[M]`; differentiable in `logp`."""
    if batch.teacher_logp is None:
        raise RuntimeError("a comparison with the teacher needs its log-probabilities")
    return batch.teacher_logp.to(logp.device) - logp


@dataclass(frozen=True)
class TeacherLogRatio:
    """R as the advantage of each token: the policy gradient of the reverse KL to the teacher (on-policy distillation).

    bound: R counts as at most this many nats, either way.
    """

    bound: float = BOUND
    needs: ClassVar[frozenset[Need]] = frozenset({"teacher_logp"})
    keep_groups: ClassVar[bool] = False

    def prepare(self, batch: Batch) -> None:
        """Nothing: R follows the policy."""

    def credit(self, batch: Batch, logp: Tensor) -> Credit:
        found = log_ratio(batch, logp.detach())
        metrics = {"teacher_kl": -found, "teacher_bound": (found.abs() > self.bound).float()}
        return Credit(found.clamp(-self.bound, self.bound), metrics=metrics)


@dataclass(frozen=True, slots=True)
class TeacherKL:
    r"""An estimate of the KL to the teacher on the policy's own tokens, as a term of the loss (KDRL, card 023).

    ``k2`` :math:`\tfrac12R^2`: its gradient :math:`-R\,\nabla\log\pi_\theta` is, in expectation, that of the reverse KL
    (its value is not what is minimised). ``k3`` :math:`e^R - R - 1`: its gradient is that of the forward KL.

    where: `all` completions, only `failed` ones (reward below `success`), or only those of `unsolved` prompts, of whose
        group none reached it (the shaping `Solved` counts).
    bound: from this |R| on the term goes on as a straight line, so that one token's pull stays within what it has
    there.
    """

    coefficient: Coefficient = 2e-3
    estimator: Literal["k2", "k3"] = "k2"
    where: Literal["all", "failed", "unsolved"] = "all"
    success: float = 1.0
    bound: float = BOUND
    name: ClassVar[str] = "teacher_divergence"
    needs: ClassVar[frozenset[Need]] = frozenset({"teacher_logp"})

    def __call__(self, batch: Batch, likelihood: Likelihood) -> Tensor:
        r = log_ratio(batch, likelihood.logp)
        near = r.detach().clamp(-self.bound, self.bound)
        value, slope = (near**2 / 2, near) if self.estimator == "k2" else (near.expm1() - near, near.expm1())
        return (value + slope * (r - near)) * self._counted(batch)

    def figures(self, batch: Batch, likelihood: Likelihood) -> dict[str, Tensor]:
        """For the run's log: the KL by the plain estimator, and where the bound was needed."""
        r = log_ratio(batch, likelihood.logp.detach())
        return {"teacher_kl": -r, "teacher_bound": (r.abs() > self.bound).float()}

    def _counted(self, batch: Batch) -> Tensor:
        """1 for the tokens that the term is taken on, `[M]`."""
        if self.where == "all":
            return torch.ones((), device=batch.reward.device)
        counted = ~succeeded(batch, self.success) if self.where == "failed" else batch.facts[SOLVED] == 0
        return batch.spread(counted.to(batch.reward.dtype))
