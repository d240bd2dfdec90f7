"""Scores without training: the loss on held-out rows, log-probabilities of whole answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from posttrain.models.causal import CausalPolicy, evaluating
from posttrain.objective.batch import Batch
from posttrain.processes import add_up
from posttrain.training.loop import Trainer
from posttrain.training.parallel import micro_batches
from posttrain.training.signals import per_token, supply
from posttrain.trajectory import Group, Trajectory


def heldout_loss(trainer: Trainer, groups: Sequence[Group]) -> float:
    """The method's own loss on rows it does not train on."""
    batch = Batch.of(groups)
    with torch.no_grad(), evaluating(trainer.learner.model):
        supply(
            trainer.objective.needs, batch, groups, trainer.learner, trainer.reference, trainer.critic, trainer.teacher,
            temperature=1.0, budget=trainer.settings.token_budget,
        )  # fmt: skip
        trainer.objective.prepare(batch)
        parts = micro_batches(batch, trainer.settings.token_budget, keep_groups=trainer.objective.keep_groups)
        losses = [float(trainer.loss(batch.select(part.sequences), batch.totals).value) * part.counts for part in parts]
        return add_up(sum(losses))


def sequence_scores(policy: CausalPolicy, trajectories: Sequence[Trajectory], budget: int = 4096) -> list[float]:
    """Sum of the action tokens' log-probabilities of each trajectory."""
    batch = Batch.of([Group([t]) for t in trajectories])
    logp = per_token(batch, budget, lambda part: policy.log_likelihood(part).logp)
    return [float(x) for x in batch.sum(logp)]
