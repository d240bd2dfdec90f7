"""Tasks that are replayed beside the one that is learned: some by trial as it is, some by imitation.

Reference: RECAP, 2025, arXiv 2510.21978 (card 012).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from posttrain.data.domains import label_of
from posttrain.objective.reweight import CHANNEL
from posttrain.rollout.context import StepContext
from posttrain.rollout.strategies.demonstrations import scored_demonstrations
from posttrain.trajectory import Group, Prompt


@dataclass(frozen=True)
class Replay:
    """Rollouts on the prompts of most domains; worked solutions (source "replay") for those of domains in `imitate`.

    Every trajectory gets the fact `channel/<domain>` by its prompt's `meta[by]`.
    """

    imitate: tuple[str, ...] = ()
    by: str = "domain"

    @property
    def demonstrations(self) -> bool:
        return bool(self.imitate)

    def __call__(self, prompts: Sequence[Prompt], context: StepContext) -> list[Group]:
        shown = [p for p in prompts if label_of(p, self.by) in self.imitate]
        tried = [p for p in prompts if label_of(p, self.by) not in self.imitate]
        groups = context.draw(tried) if tried else []
        solutions = scored_demonstrations(shown, context)
        groups += [Group([replace(s, source="replay")], p) for s, p in zip(solutions, shown, strict=True)]
        for group in groups:
            assert group.prompt is not None
            for trajectory in group.trajectories:
                trajectory.facts[CHANNEL + label_of(group.prompt, self.by)] = 1.0
        return groups
