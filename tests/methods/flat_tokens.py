"""One demonstrated token, whose probability is known: the unit checks of the cards."""

from __future__ import annotations

from typing import Any

import torch

from posttrain.objective.batch import Batch
from posttrain.objective.likelihood import Likelihood
from posttrain.trajectory import Group, Source, Trajectory


def one_token(objective: Any, probability: float, source: Source = "expert") -> tuple[float, float]:
    """Loss, and its gradient with respect to the token's logit, of a choice between two tokens."""
    tokens = torch.tensor([0, 1])
    batch = Batch.of([Group([Trajectory(tokens, torch.tensor([False, True]), source=source, reward=1.0)])])
    batch.weight = batch.weight.double()
    objective.prepare(batch)
    odds = torch.tensor(probability / (1 - probability), dtype=torch.float64)
    logits = torch.stack([torch.zeros_like(odds), odds.log()]).requires_grad_()
    logp = logits.log_softmax(0)
    loss = objective(batch, Likelihood(logp[1:], entropy=-(logp.exp() * logp).sum()[None]), batch.totals)
    (gradient,) = torch.autograd.grad(loss.surrogate, logits)
    return float(loss.value), float(gradient[1])
