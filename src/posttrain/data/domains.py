"""Rows of several domains: the domain of the next row is drawn by weights; within a domain every row comes once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.data.sampler import Shuffled
from posttrain.trajectory import Group, PosttrainError, Prompt


class ByDomain:
    """For every row a domain is drawn, and then the domain's next row, in an order of its own that is shuffled anew
    when all of its rows were taken.

    Args:
        rows: prompts or groups; the prompt's `meta[by]` names the domain.
        weights: by domain, relative to their sum; domains not named have none. None: all alike.
        by: the label that tells domains apart.
    """

    def __init__(
        self,
        rows: Sequence[Prompt | Group],
        seed: int = 0,
        weights: Mapping[str, float] | None = None,
        by: str = "domain",
    ) -> None:
        self.seed, self.by = seed, by
        members: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            members.setdefault(label_of(row, by), []).append(i)
        if not members:
            raise PosttrainError("there is no row to train on; expected at least 1")
        self.rows = {name: members[name] for name in sorted(members)}
        self.orders = {name: Shuffled(own, seed * 1009 + i) for i, (name, own) in enumerate(self.rows.items())}
        self.weights = self._shares(weights)
        self.drawn = 0

    @property
    def domains(self) -> list[str]:
        """Names in alphabetical order, that of all arrays."""
        return list(self.rows)

    def probabilities(self) -> NDArray[np.float64]:
        """`[domains]`, the chance of each for the next row."""
        return self.weights

    def take(self, count: int) -> list[int]:
        edges, domains = np.cumsum(self.probabilities()), self.domains
        edges[-1] = max(edges[-1], 1.0)  # rounding must not leave a gap below 1
        chosen = []
        for _ in range(count):
            at = np.random.default_rng([self.seed % 2**64, self.drawn]).random()
            name = domains[int(np.searchsorted(edges, at, side="right"))]
            chosen.append(self.rows[name][self.orders[name].take(1)[0]])
            self.drawn += 1
        return chosen

    def admit(self, groups: Sequence[Group]) -> list[Group]:
        return list(groups)

    def metrics(self) -> dict[str, float]:
        """The chance of each domain, for the run's log."""
        return {f"share/{name}": float(p) for name, p in zip(self.domains, self.probabilities(), strict=True)}

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "taken": {name: order.taken for name, order in self.orders.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = int(state["drawn"])
        for name, order in self.orders.items():
            order.taken = int(state["taken"][name])

    def _shares(self, weights: Mapping[str, float] | None) -> NDArray[np.float64]:
        if weights is None:
            return np.full(len(self.rows), 1 / len(self.rows))
        unknown = sorted(set(weights) - set(self.rows))
        if unknown:
            raise PosttrainError(
                f"weights name {self.by} {unknown[0]!r}, which no row has; the rows have {', '.join(self.rows)}"
            )
        given = np.array([float(weights.get(name, 0.0)) for name in self.rows])
        if not (np.isfinite(given).all() and (given >= 0).all() and given.sum() > 0):
            raise PosttrainError(f"weights are {dict(weights)}; expected numbers from 0, one of them above 0")
        return given / given.sum()


def label_of(row: Prompt | Group, by: str) -> str:
    """The domain of a row."""
    prompt = row.prompt if isinstance(row, Group) else row
    if prompt is None or by not in prompt.meta:
        what = "" if prompt is None else f" {prompt.question[:60]!r}"
        raise PosttrainError(
            f"row{what} has no meta[{by!r}], by which the method tells domains apart; take a task whose problems have "
            f"it, or name another label: by=..."
        )
    return str(prompt.meta[by])
