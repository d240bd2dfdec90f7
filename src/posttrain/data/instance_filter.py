"""A filter before training: prompts on which the policy never succeeds are left out for the stage.

Reference: Reinforcement Fine-Tuning Naturally Mitigates Forgetting in Continual Post-Training, 2025, arXiv 2507.05386
(card 004).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from posttrain.data.sampler import Shuffled
from posttrain.trajectory import Group, PosttrainError, Prompt, Trajectory

Draw = Callable[[Sequence[Prompt], int], list[Group]]  # scored completions, so many a prompt
AT_A_TIME = 64  # prompts tried together: of their completions only the counts are kept


class Competent(Shuffled):
    r"""Every row once an epoch, of the rows that the policy solves at least once in `samples` tries before the stage's
    first step: :math:`|\{n : r(x, y_n) \ge \tau\}| \ge 1`.

    The tries are drawn by the policy that the stage starts from, once; a row that becomes solvable later stays out.

    Args:
        samples: N, completions a prompt. threshold: τ, the reward from which a completion is a success; -inf keeps all.
        component: the reward component that is looked at; None takes the total.
        drop_solved: leave out those that it always solves, too.
    """

    def __init__(
        self,
        rows: Sequence[Prompt | Group],
        seed: int = 0,
        samples: int = 8,
        threshold: float = 1.0,
        component: str | None = None,
        drop_solved: bool = False,
    ) -> None:
        super().__init__(rows, seed)
        if samples < 1:
            raise PosttrainError(f"instance filter: samples is {samples}; expected at least 1")
        self.samples, self.threshold, self.component = samples, threshold, component
        self.drop_solved = drop_solved
        self.counts: list[int] | None = None
        self.kept: list[int] = list(range(self.rows))

    def survey(self, prompts: Sequence[Prompt], draw: Draw) -> None:
        """Count the successes on every prompt, the first time that it is called."""
        if self.counts is not None:
            return
        counts = []
        for start in range(0, len(prompts), AT_A_TIME):
            groups = draw(prompts[start : start + AT_A_TIME], self.samples)
            counts += [sum(self._score(t) >= self.threshold for t in g.trajectories) for g in groups]
        self._keep(counts)

    def take(self, count: int) -> list[int]:
        return [self.kept[place] for place in super().take(count)]

    def metrics(self) -> dict[str, float]:
        """The share of the rows that is kept."""
        return {} if self.counts is None else {"competent": len(self.kept) / len(self.counts)}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if state["counts"] is not None:
            self._keep(state["counts"])

    def _score(self, trajectory: Trajectory) -> float:
        if self.component is None:
            return float(trajectory.reward)
        if self.component not in trajectory.rewards:
            raise PosttrainError(
                f"instance filter: the reward has no component {self.component!r}; it has "
                f"{', '.join(trajectory.rewards)}"
            )
        return float(trajectory.rewards[self.component])

    def _keep(self, counts: list[int]) -> None:
        most = self.samples - 1 if self.drop_solved else self.samples
        self.counts = counts
        self.kept = [row for row, count in enumerate(counts) if 1 <= count <= most]
        self.rows = len(self.kept)
        if not self.kept:
            raise PosttrainError(
                f"instance filter: none of {len(counts)} prompts is solved "
                f"{'sometimes, but not always' if self.drop_solved else 'at least once'} in {self.samples} tries; "
                f"lower threshold ({self.threshold:g}), raise samples, or train on easier prompts first"
            )
