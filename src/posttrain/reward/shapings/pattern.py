"""Phrases of reasoning in the place of the reward, or as a repair of a reward model's low scores.

Reference: The Climb Carves Wisdom Deeper Than the Summit, 2025, arXiv 2505.22653 (card 079).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from posttrain.reward.reasoning_pattern import ReasoningPattern
from posttrain.reward.verifiers import Verifier
from posttrain.rollout.context import StepContext
from posttrain.trajectory import Group, PosttrainError, Trajectory


@dataclass(frozen=True)
class PatternOnly:
    """The pattern's score is the reward for the first `share` of the stage's steps; then it is the task's own.

    Leaves the fact and the metric `pattern`.
    """

    pattern: Verifier = field(default_factory=ReasoningPattern)
    share: float = 1.0

    def __call__(self, groups: Sequence[Group], context: StepContext) -> None:
        scored(groups, self.pattern, context)
        if context.step < self.share * context.total:
            for group in groups:
                for trajectory in group.trajectories:
                    trajectory.reward = trajectory.facts["pattern"]


@dataclass(frozen=True)
class Calibrated:
    """Lifts low scores s of a reward model by the pattern: min(1, s + weight * pattern) where s < `below`.

    Good reasoning that the model wrongly scored low comes back; what it scored high stays as it is.
    form: the name of a component (0 or 1) that the score is multiplied with first; None: nothing is.

    Leaves the fact and the metric `pattern`, and the metric `lifted`, the share of scores below.
    """

    pattern: Verifier = field(default_factory=lambda: ReasoningPattern("open-ended", answer="none"))
    weight: float = 0.1
    below: float = 0.5
    form: str | None = None

    def __call__(self, groups: Sequence[Group], context: StepContext) -> None:
        scored(groups, self.pattern, context)
        lifted = []
        for group in groups:
            for trajectory in group.trajectories:
                score = trajectory.reward * self._form(trajectory)
                lifted.append(score < self.below)
                trajectory.reward = min(1.0, score + self.weight * trajectory.facts["pattern"]) if lifted[-1] else score
        context.metrics["lifted"] = sum(lifted) / len(lifted)

    def _form(self, trajectory: Trajectory) -> float:
        if self.form is None:
            return 1.0
        if self.form not in trajectory.rewards:
            raise PosttrainError(
                f"calibration: the reward has no component {self.form!r}; it has {', '.join(trajectory.rewards)}"
            )
        return trajectory.rewards[self.form]


def scored(groups: Sequence[Group], pattern: Verifier, context: StepContext) -> None:
    """Leave every completion's score by the pattern as the fact `pattern`, and their mean as a metric."""
    values = []
    for group in groups:
        assert group.prompt is not None
        for t in group.trajectories:
            values.append(float(pattern(t.text, group.prompt, tokens=t.actions, finish=t.finish)))
            t.facts["pattern"] = values[-1]
    context.metrics["pattern"] = sum(values) / len(values)
