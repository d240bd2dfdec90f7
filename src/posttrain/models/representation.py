"""What a model makes of a whole completion: the mean of its hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.models.causal import CausalPolicy, evaluating
from posttrain.objective.batch import Batch
from posttrain.trajectory import Group, Trajectory


@torch.no_grad()
def mean_hidden(policy: CausalPolicy, groups: Sequence[Group], budget: int = 4096) -> Tensor:
    """`[trajectories, width]` fp32 on the CPU: the mean of the final hidden states at the tokens the policy chose.

    At, not before: the state at the last token has read the whole completion. budget: model tokens at a time.
    """
    shifted = [Group([_one_on(t, policy.max_length) for t in g.trajectories]) for g in groups]
    batch = Batch.of(shifted)
    total = torch.zeros(len(batch), policy.head().weight.shape[1], dtype=torch.float32)
    with evaluating(policy.model):
        for members in batch.partition(budget, keep_groups=False):
            part = batch.select(members)
            hidden = policy.hidden_states(part).float().cpu()
            total[members] = hidden.new_zeros(len(part), hidden.shape[1]).index_add(0, part.sequence, hidden)
    return total / batch.lengths[:, None]


def _one_on(trajectory: Trajectory, limit: int) -> Trajectory:
    """The trajectory whose targets stand one place later: what predicts a target is then the state at a chosen token.

    It ends in one token more, which is never read; where the context has no room for it, the last state is left out.
    """
    tokens, mask = trajectory.tokens, trajectory.action_mask
    tokens = torch.cat([tokens, tokens[-1:]])
    mask = torch.cat([mask.new_zeros(1), mask])
    if len(tokens) > limit and int(mask[:limit].sum()):
        tokens, mask = tokens[:limit], mask[:limit]
    return Trajectory(tokens, mask)
