"""The greedy answer beside the sampled ones, as their baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from posttrain.rollout.context import StepContext
from posttrain.trajectory import Group, Prompt


@dataclass(frozen=True, slots=True)
class GreedyBeside:
    """Draws a group for each prompt and one greedy completion, whose reward every member carries as the fact `greedy`.

    The greedy completion is not trained on; it counts as a rollout.
    """

    def __call__(self, prompts: Sequence[Prompt], context: StepContext) -> list[Group]:
        groups = context.draw(prompts)
        likeliest = context.sample(prompts, 1, sampling=replace(context.sampling, temperature=0.0))
        context.score(likeliest)
        for group, best in zip(groups, likeliest, strict=True):
            for trajectory in group.trajectories:
                trajectory.facts["greedy"] = best.trajectories[0].reward
        context.metrics["reward_greedy"] = sum(g.trajectories[0].reward for g in likeliest) / len(likeliest)
        return groups
