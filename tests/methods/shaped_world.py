"""A world's batch with the rewards that a method's shapings make of given texts and rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from padded_world import World

from posttrain.models.causal import CausalPolicy
from posttrain.objective.batch import Batch
from posttrain.training.method import Method
from posttrain.trajectory import Group, Prompt, Trajectory
from scored_groups import context


def groups_of(world: World, texts: Sequence[str], rewards: Sequence[float], **parts: Sequence[float]) -> list[Group]:
    """The world's sequences as scored groups. parts: facts or components of the reward, one number a sequence."""
    batch = world.batch
    found: list[Group] = []
    for s, tokens in enumerate(batch.tokens):
        if s == 0 or int(batch.group[s]) != int(batch.group[s - 1]):
            found.append(Group([], Prompt(tokens[:1], text="question")))
        mask = torch.zeros(len(tokens), dtype=torch.bool)
        mask[batch.place[batch.sequence == s]] = True
        own = {name: values[s] for name, values in parts.items()}
        found[-1].trajectories.append(
            Trajectory(tokens, mask, reward=rewards[s], rewards=own, facts=dict(own), text=texts[s], finish="stop")
        )
    return found


def shaped(
    world: World,
    method: Method,
    groups: Sequence[Group],
    *,
    seed: int = 0,
    step: int = 0,
    total: int = 1,
    reference: Callable[[], CausalPolicy] | None = None,
) -> Batch:
    """The world's batch with what the method's shapings make of the groups' rewards, in float64."""
    at = context(None if reference is None else reference(), seed=seed, step=step, total=total)
    for shaping in method.shaping:
        shaping(groups, at)
    batch = world.fresh()
    batch.reward = torch.tensor([t.reward for g in groups for t in g.trajectories], dtype=torch.float64)
    batch.reference_logp = batch.reference_logp if "reference_logp" in method.objective.needs else None
    return batch
