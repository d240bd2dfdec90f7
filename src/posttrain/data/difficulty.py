"""Training rows of the levels that suit the policy: neither too hard to be solved by trial, nor already known.

Reference: SimpleRL-Zoo, 2025, arXiv 2503.18892 (card 100).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from posttrain.data.sampler import Shuffled
from posttrain.trajectory import Group, PosttrainError, Prompt

Draw = Callable[[Sequence[Prompt], int], list[Group]]  # scored completions, so many a prompt


class MatchedLevels(Shuffled):
    """Every row once an epoch, of the rows of those levels whose pass rate before the stage's first step is in a range;
    where none is, of the level nearest to it.

    The rate is measured once, by `samples` tries at some prompts of each level. Rows of one level (or of none) need no
    tries: all are taken.

    Args:
        by: the label that names a row's level. low, high: the range, shares in [0, 1].
        probe: prompts of each level that are tried. samples: completions a prompt.
        threshold: the reward from which a completion is right. component: of the reward; None takes the total.
    """

    def __init__(
        self,
        rows: Sequence[Prompt | Group],
        seed: int = 0,
        by: str = "domain",
        low: float = 0.1,
        high: float = 0.8,
        probe: int = 32,
        samples: int = 4,
        threshold: float = 1.0,
        component: str | None = None,
    ) -> None:
        super().__init__(rows, seed)
        if not 0 <= low <= high <= 1 or min(probe, samples) < 1:
            raise PosttrainError(
                f"levels: low={low}, high={high}, probe={probe}, samples={samples}; expected shares in order and "
                f"numbers from 1"
            )
        self.low, self.high, self.probe, self.samples = low, high, probe, samples
        self.threshold, self.component = threshold, component
        self.levels: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            self.levels.setdefault(_level(row, by), []).append(i)
        self.rates: dict[str, float] = {}
        self.kept = list(range(self.rows))

    @property
    def chosen(self) -> list[str]:
        """The levels that are trained on, in alphabetical order."""
        if not self.rates:
            return sorted(self.levels)
        suited = [name for name, rate in self.rates.items() if self.low <= rate <= self.high]
        nearest = min(self.rates, key=lambda name: max(self.low - self.rates[name], self.rates[name] - self.high))
        return sorted(suited) or [nearest]

    def survey(self, prompts: Sequence[Prompt], draw: Draw) -> None:
        """Measure the pass rates, the first time that it is called."""
        if self.rates or len(self.levels) < 2:
            return
        rates = {}
        for place, name in enumerate(sorted(self.levels)):
            own = self.levels[name]
            order = Shuffled(own, self.seed * 1009 + place).take(min(self.probe, len(own)))
            groups = draw([prompts[own[i]] for i in order], self.samples)
            right = [self._score(t) >= self.threshold - 1e-6 for group in groups for t in group.trajectories]
            rates[name] = sum(right) / len(right)
        self._keep(rates)

    def take(self, count: int) -> list[int]:
        return [self.kept[place] for place in super().take(count)]

    def metrics(self) -> dict[str, float]:
        """The pass rates before training, and the share of rows that are trained on."""
        total = sum(map(len, self.levels.values()))
        return {f"pass_rate/{n}": rate for n, rate in self.rates.items()} | {"matched": len(self.kept) / total}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"rates": self.rates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if state["rates"]:
            self._keep({str(name): float(rate) for name, rate in state["rates"].items()})

    def _keep(self, rates: dict[str, float]) -> None:
        self.rates = rates
        self.kept = sorted(i for name in self.chosen for i in self.levels[name])
        self.rows = len(self.kept)

    def _score(self, trajectory: Any) -> float:
        if self.component is None:
            return float(trajectory.reward)
        if self.component not in trajectory.rewards:
            raise PosttrainError(
                f"levels: the reward has no component {self.component!r}; it has {', '.join(trajectory.rewards)}"
            )
        return float(trajectory.rewards[self.component])


def _level(row: Prompt | Group, by: str) -> str:
    """The row's level; all rows without one are of the level without a name."""
    prompt = row.prompt if isinstance(row, Group) else row
    return str(prompt.meta.get(by, "")) if prompt is not None else ""
