"""Which completions count as right."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.trajectory import PosttrainError, Trajectory


@dataclass(frozen=True, slots=True)
class Right:
    """A completion is right where a component of its reward (the reward itself, where None) is at least `threshold`."""

    component: str | None = None
    threshold: float = 0.5

    def __call__(self, trajectory: Trajectory) -> bool:
        if self.component is None:
            return trajectory.reward >= self.threshold - 1e-9
        if self.component not in trajectory.rewards:
            raise PosttrainError(
                f"the reward has no component {self.component!r} that says what is right; it has "
                f"{', '.join(trajectory.rewards) or 'none'}"
            )
        return trajectory.rewards[self.component] >= self.threshold - 1e-9
