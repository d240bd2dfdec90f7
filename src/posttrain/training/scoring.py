"""Scores without training: the loss on held-out rows, log-probabilities of whole answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from posttrain.models.causal import CausalPolicy, evaluating
from posttrain.objective.batch import Batch
from posttrain.training.loop import Trainer
from posttrain.training.signals import per_token, supply
from posttrain.trajectory import Group, Trajectory


def heldout_loss(trainer: Trainer, groups: Sequence[Group]) -> float:
    """The method's own loss on rows it does not train on."""
    batch = Batch.of(groups)
    with torch.no_grad(), evaluating(trainer.policy.model):
        supply(
            trainer.objective.needs, batch, groups, trainer.policy, trainer.reference, trainer.critic, trainer.teacher,
            temperature=1.0, budget=trainer.settings.token_budget,
        )  # fmt: skip
        trainer.objective.prepare(batch)
        parts = batch.split(trainer.settings.token_budget, keep_groups=trainer.objective.keep_groups)
        return sum(float(trainer.loss(part, batch.totals).value) for part in parts)


def sequence_scores(policy: CausalPolicy, trajectories: Sequence[Trajectory], budget: int = 4096) -> list[float]:
    """Sum of the action tokens' log-probabilities of each trajectory."""
    batch = Batch.of([Group([t]) for t in trajectories])
    logp = per_token(batch, budget, lambda part: policy.log_likelihood(part).logp)
    return [float(x) for x in batch.sum(logp)]
