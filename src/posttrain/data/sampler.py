"""Samplers: which rows a step takes, and which of the fresh groups it trains on. Part of the resumable state."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any, Protocol

import torch

from posttrain.trajectory import Group, PosttrainError


class Sampler(Protocol):
    """State is a JSON object: a resumed run takes exactly the rows that an uninterrupted one would have taken.

    One may also have `survey(prompts, draw)`, called before every step with all prompts of the stage and a function
    that draws scored completions (`draw(prompts, samples)`), and `metrics()`, figures for the run's log. One for rows
    of a data set may have `select(groups, policy, teacher)`, called once before the first step (and again where a run
    is resumed), after which `kept` are the numbers of the rows that it takes.
    """

    def take(self, count: int) -> list[int]:
        """Row numbers of the next `count` rows."""
        ...

    def admit(self, groups: Sequence[Group]) -> list[Group]:
        """Those of the freshly scored groups to train on (online methods)."""
        ...

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Shuffled:
    """Every row once an epoch, in an order that depends on the seed and the epoch alone."""

    def __init__(self, rows: Sized, seed: int = 0) -> None:
        if not rows:
            raise PosttrainError("there is no row to train on; expected at least 1")
        self.rows, self.seed = len(rows), seed
        self.taken = 0
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    @property
    def epoch(self) -> float:
        return self.taken / self.rows

    def take(self, count: int) -> list[int]:
        chosen = []
        for _ in range(count):
            epoch, place = divmod(self.taken, self.rows)
            if epoch != self._epoch:
                mix = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % (1 << 63))
                self._epoch, self._order = epoch, torch.randperm(self.rows, generator=mix)
            chosen.append(int(self._order[place]))
            self.taken += 1
        return chosen

    def admit(self, groups: Sequence[Group]) -> list[Group]:
        return list(groups)

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = int(state["taken"])


class Undecided(Shuffled):
    """Trains only on groups whose rewards differ; more prompts are drawn in place of the others (DAPO's dynamic
    sampling, 2025, arXiv 2503.14476)."""

    def admit(self, groups: Sequence[Group]) -> list[Group]:
        return [g for g in groups if len(g) < 2 or float(g.rewards.max() - g.rewards.min()) > 1e-9]
