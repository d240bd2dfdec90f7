"""Log-probabilities and entropies of sequences under a policy, without gradient, in packed micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.models.causal import CausalPolicy, evaluating
from posttrain.objective.batch import Batch
from posttrain.trajectory import Group, Trajectory


@torch.no_grad()
def action_statistics(
    policy: CausalPolicy, trajectories: Sequence[Trajectory], budget: int, *, entropy: bool = False
) -> list[Tensor]:
    """For each trajectory its action tokens' log-probabilities (or, with `entropy`, the entropies of the distributions
    they were drawn from), `[actions]` fp32 in nats, at temperature 1. `budget` model tokens are computed at a time.
    """
    batch = Batch.of([Group([t]) for t in trajectories])
    found: list[Tensor] = [torch.empty(0)] * len(trajectories)
    with evaluating(policy.model):
        for sequences in batch.partition(budget, keep_groups=False):
            part = batch.select(sequences)
            answer = policy.log_likelihood(part, entropy=entropy)
            values = answer.entropy if entropy else answer.logp
            assert values is not None
            pieces = values.float().cpu().split(part.lengths.tolist())
            for s, piece in zip(sequences.tolist(), pieces, strict=True):
                found[s] = piece
    return found
