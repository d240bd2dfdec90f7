"""Imitating a demonstration only where the policy is in doubt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from posttrain.objective.advantage import Fixed
from posttrain.objective.batch import Batch
from posttrain.objective.divergence import Need
from posttrain.trajectory import SOURCES, Source


@dataclass(frozen=True)
class MostUncertain(Fixed):
    r"""Another advantage, of which a demonstration's tokens keep theirs only where the policy is least sure of them:
    the share `keep` with the highest entropy, counted over all such tokens of the step; the others have advantage 0
    (Prefix-RFT, 2025, arXiv 2507.01679, card 035).

    Of n such tokens :math:`\lfloor(1-\text{keep})\,n\rfloor` are dropped; of equal entropies the earlier go first.
    The entropies are those of the weights that sampled, once a step, so neither micro-batches nor several updates
    change which tokens count.

    base: the advantage. sources: who wrote the tokens in question.
    """

    base: Fixed
    keep: float = 0.2
    sources: tuple[Source, ...] = ("expert",)
    per_sequence: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return self.base.needs | {"old_entropy"} if self.keep < 1 else self.base.needs

    @property
    def keep_groups(self) -> bool:  # type: ignore[override]
        return self.base.keep_groups

    @property
    def minimum_group(self) -> int:  # type: ignore[override]
        return self.base.minimum_group

    def of(self, batch: Batch) -> Tensor:
        found = self.base.of(batch)
        advantage = batch.spread(found) if self.base.per_sequence else found
        assert batch.token_source is not None
        wanted = torch.tensor([SOURCES.index(s) for s in self.sources])
        given = torch.isin(batch.token_source, wanted).nonzero()[:, 0]
        dropped = int((1 - self.keep) * len(given) + 1e-9)
        if not dropped:
            return advantage
        order = batch.extras["old_entropy"][given].argsort(stable=True)
        return advantage.index_fill(0, given[order[:dropped]], 0.0)
