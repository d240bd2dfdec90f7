r"""Divergences: differentiable terms added to the surrogate, a value a token.

k1, k2, k3 are the usual single-sample estimators of :math:`KL(\pi_\theta\|\pi_{ref})` (Schulman, 2020).
Every term carries its own gradient: it is added to the loss as it stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from posttrain.objective.batch import Batch
from posttrain.objective.denominator import old_logp
from posttrain.objective.likelihood import Likelihood
from posttrain.objective.schedule import Coefficient

Need = Literal[
    "entropy", "old_entropy", "reference_logp", "reference_hidden", "teacher_logp", "old_logp", "value",
    "mismatched_kl", "experts", "collision",
]  # fmt: skip


class Divergence(Protocol):
    """coefficient: weight in the loss, a number or a schedule; name: what metrics call it; needs: signals the loop must
    supply."""

    @property
    def coefficient(self) -> Coefficient: ...
    @property
    def name(self) -> str: ...
    @property
    def needs(self) -> frozenset[Need]: ...
    def __call__(self, batch: Batch, likelihood: Likelihood) -> Tensor: ...


@runtime_checkable
class Reporting(Protocol):
    """A divergence that has more to say for the run's log than its own mean."""

    def figures(self, batch: Batch, likelihood: Likelihood) -> dict[str, Tensor]:
        """Figures by name, each a value a token or a sequence, to be averaged over the step."""
        ...


@dataclass(frozen=True, slots=True)
class ReferenceKL:
    r"""KL to a frozen reference from the sampled tokens' log-probabilities, with :math:`d = \log\pi_{ref}-\log\pi`:

    k1 :math:`-d`, k2 :math:`d^2/2`, k3 :math:`e^{d}-d-1` (GRPO's).

    corrected: times the ratio :math:`\pi_\theta/\pi_{old}`, with its gradient, which makes k1's and k3's an unbiased
    gradient of the KL, also after updates (DeepSeek-V3.2, 2025, arXiv 2512.02556).
    """

    coefficient: Coefficient = 0.04
    estimator: Literal["k1", "k2", "k3"] = "k3"
    corrected: bool = False
    name: ClassVar[str] = "kl"
    needs: ClassVar[frozenset[Need]] = frozenset({"reference_logp"})

    def __call__(self, batch: Batch, likelihood: Likelihood) -> Tensor:
        assert batch.reference_logp is not None
        d = batch.reference_logp - likelihood.logp
        term = {"k1": -d, "k2": d * d / 2, "k3": torch.expm1(d) - d}[self.estimator]
        return term * (likelihood.logp - old_logp(batch, likelihood.logp)).exp() if self.corrected else term


@dataclass(frozen=True, slots=True)
class FullKL:
    """KL to a frozen reference over the full vocabulary: `reverse` KL(policy || ref), `forward` KL(ref || policy)."""

    coefficient: Coefficient = 0.1
    direction: Literal["forward", "reverse"] = "forward"
    name: ClassVar[str] = "kl"
    needs: ClassVar[frozenset[Need]] = frozenset({"reference_hidden"})

    def __call__(self, batch: Batch, likelihood: Likelihood) -> Tensor:
        assert likelihood.divergence is not None
        return likelihood.divergence


@dataclass(frozen=True, slots=True)
class EntropyBonus:
    """Minus the entropy of the next-token distribution: a positive coefficient keeps the policy exploring."""

    coefficient: Coefficient = 0.001
    name: ClassVar[str] = "negative_entropy"
    needs: ClassVar[frozenset[Need]] = frozenset({"entropy"})

    def __call__(self, batch: Batch, likelihood: Likelihood) -> Tensor:
        assert likelihood.entropy is not None
        return -likelihood.entropy


@dataclass(frozen=True, slots=True)
class CriticLoss:
    r"""Squared error of the critic, :math:`\frac12 \max((V-R)^2, (\mathrm{clip}(V, V_{old}\pm c)-R)^2)` (PPO)."""

    coefficient: Coefficient = 0.1
    clip: float = 0.2
    name: ClassVar[str] = "value_loss"
    needs: ClassVar[frozenset[Need]] = frozenset({"value"})

    def __call__(self, batch: Batch, likelihood: Likelihood) -> Tensor:
        assert likelihood.value is not None
        assert batch.returns is not None
        assert batch.value is not None
        near = batch.value + (likelihood.value - batch.value).clamp(-self.clip, self.clip)
        return torch.maximum((likelihood.value - batch.returns) ** 2, (near - batch.returns) ** 2) / 2
