"""The controls on the reward of a label that stands among the rollouts of its group (ViSurf)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from posttrain.rollout.context import StepContext
from posttrain.trajectory import Group, Trajectory


@dataclass(frozen=True, slots=True)
class LabelControl:
    """A label earns nothing for what it has not, and nothing at all once the policy matches it (card 007).

    thinking: components of the reward that a label takes no credit for, since it shows no reasoning.
    smooth: where some rollout earns as much as the label (in the other components), the label's reward is the mean of
        the rollouts': its advantage is then exactly 0, whatever the group's deviation.

    Logs `label_matched`, the share of labels that some rollout matches, and `label_gap`, the label's reward above the
    rollouts' mean.
    """

    thinking: tuple[str, ...] = ()
    smooth: bool = True

    def __call__(self, groups: Sequence[Group], context: StepContext) -> None:
        matched, gaps = [], []
        for group in groups:
            rollouts = [t for t in group.trajectories if t.source == "policy"]
            # in fp32, as the objective will read them: then the mean of the group with the label is the label's reward
            mean = float(torch.tensor([t.reward for t in rollouts]).float().double().mean())
            for label in (t for t in group.trajectories if t.source == "expert"):
                label.reward = self._without_thinking(label, context)
                equal = max(self._without_thinking(t, context) for t in rollouts) >= label.reward - 1e-6
                if equal and self.smooth:
                    label.reward = mean
                matched.append(equal)
                gaps.append(label.reward - mean)
        if matched:
            context.metrics["label_matched"] = sum(matched) / len(matched)
            context.metrics["label_gap"] = sum(gaps) / len(gaps)

    def _without_thinking(self, trajectory: Trajectory, context: StepContext) -> float:
        credit = sum(context.weight(name) * trajectory.rewards[name] for name in self.thinking)
        return trajectory.reward - credit
