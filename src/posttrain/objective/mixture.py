r"""Several objectives in one step, each on the sequences of its own sources.

.. math:: L = \sum_k w_k\, L_k(\text{sequences of source}_k)

Rollouts and demonstrations that share a step (CHORD, HPT, AHPO and their relatives) have different advantages,
denominators and normalisers; each `Term` is a whole objective with its own counts. A mixture answers the training loop
as an objective does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from posttrain.objective.batch import Batch, Totals
from posttrain.objective.divergence import FullKL, Need
from posttrain.objective.estimator import Loss, Objective
from posttrain.objective.likelihood import Likelihood
from posttrain.objective.schedule import Coefficient, at
from posttrain.trajectory import SOURCES, Source


@dataclass(frozen=True)
class Term:
    """An objective for the sequences of some sources, times `weight` (a number or a schedule).

    whole: its advantages compare a sequence with all of the step's, whatever their source (a demonstration with the
    rollouts of its group), not only with those of its own sources.
    """

    objective: Objective
    sources: tuple[Source, ...]
    weight: Coefficient = 1.0
    whole: bool = False

    def members(self, batch: Batch) -> Tensor:
        """Numbers of the term's sequences."""
        wanted = torch.tensor([SOURCES.index(s) for s in self.sources])
        return torch.isin(batch.source.cpu(), wanted).nonzero()[:, 0]


@dataclass(frozen=True)
class Mixture:
    """The weighted sum of its terms; a sequence of a source that no term names is an error."""

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        named = [s for term in self.terms for s in term.sources]
        if not self.terms or len(named) != len(set(named)):
            raise ValueError(f"a mixture needs terms with a source each, none named twice; got {named}")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset().union(*(term.objective.needs for term in self.terms))

    @property
    def full_divergence(self) -> FullKL | None:
        found = [d for term in self.terms if (d := term.objective.full_divergence) is not None]
        if len(set(found)) > 1:
            raise ValueError("a mixture can hold one kind of full-vocabulary divergence")
        return found[0] if found else None

    @property
    def keep_groups(self) -> bool:
        return any(term.objective.keep_groups for term in self.terms)

    @property
    def minimum_group(self) -> int:
        return max((t.objective.minimum_group for t in self.terms if "policy" in t.sources), default=1)

    @property
    def parts(self) -> tuple[object, ...]:
        return tuple(part for term in self.terms for part in term.objective.parts)

    def prepare(self, batch: Batch) -> None:
        """Set each term's advantages over the whole step."""
        advantages: list[tuple[Tensor, Tensor]] = []
        returns: list[tuple[Tensor, Tensor]] = []
        covered = 0
        for term in self.terms:
            members = term.members(batch)
            covered += len(members)
            if not len(members):
                continue
            index = batch.tokens_of(members)
            compared = replace(batch) if term.whole else batch.select(members)
            compared.advantage = compared.returns = None
            term.objective.prepare(compared)
            here = index if term.whole else slice(None)
            for found, own in ((advantages, compared.advantage), (returns, compared.returns)):
                if own is not None:
                    found.append((index, own[here]))
        batch.advantage = _scattered(batch, advantages)
        batch.returns = _scattered(batch, returns) if returns else None
        if covered < len(batch):
            raise ValueError("a sequence has a source that no term of the mixture names")

    def __call__(self, batch: Batch, likelihood: Likelihood, totals: Totals) -> Loss:
        """Loss of a micro-batch; `totals` counts the whole step, by source where it says so."""
        device = likelihood.logp.device
        surrogate = likelihood.logp.sum() * 0
        value = surrogate.detach().clone()
        metrics: dict[str, tuple[float, float]] = {}
        for term in self.terms:
            members = term.members(batch)
            if not len(members):
                continue
            index = batch.tokens_of(members.cpu()).to(device)
            counts = totals.of_sources(term.sources)
            loss = term.objective(batch.select(members.to(batch.source.device)), likelihood.take(index), counts)
            weight = at(term.weight, batch)
            surrogate, value = surrogate + weight * loss.surrogate, value + weight * loss.value
            label = "" if "policy" in term.sources else f"{term.sources[0]}_"
            for name, (total, count) in loss.metrics.items():
                before = metrics.get(label + name, (0.0, 0.0))
                metrics[label + name] = (before[0] + total, before[1] + count)
        return Loss(surrogate, value.detach(), metrics)


def _scattered(batch: Batch, pieces: list[tuple[Tensor, Tensor]]) -> Tensor:
    """`[M]` from the values of some tokens each; 0 elsewhere."""
    values = torch.cat([v for _, v in pieces]) if pieces else batch.reward.new_zeros(0)
    whole = values.new_zeros(batch.target.numel())
    if pieces:
        whole[torch.cat([i for i, _ in pieces])] = values
    return whole
