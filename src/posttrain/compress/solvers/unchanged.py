"""No solver: for methods that make something else of a model than its weights sparse or short."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from posttrain.compress.solvers.solver import Prepare, Solver
from posttrain.compress.walk import Block


@dataclass(frozen=True)
class Unchanged(Solver):
    """Leaves every layer as it is; nothing is packed."""

    @property
    def uses_data(self) -> bool:
        return False

    def solve_model(self, blocks: Iterable[Block], prepare: Prepare, done: Callable[[Block], None]) -> None:
        """Nothing is walked."""

    def solve_block(self, block: Block) -> None:
        """Nothing is installed."""
