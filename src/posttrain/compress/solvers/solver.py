"""A solver picks the codes: of one layer at a time, of a block, or of several blocks together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.weight import PackedWeight
from posttrain.compress.walk import Block
from posttrain.trajectory import PosttrainError

Prepare = Callable[[Block], None]


@dataclass(frozen=True)
class Solver(ABC):
    """Gives every linear layer of a model its packed weight.

    Subclasses say what they need of the float model: `keeps_float`, a copy of each block (`Block.before`), and with it
    `float_inputs`, its hidden states, for which each block is computed once more (for `Block.targets`).
    """

    @property
    def keeps_float(self) -> bool:
        return False

    @property
    def float_inputs(self) -> bool:
        return self.keeps_float

    def check(self, shape: tuple[int, int], name: str) -> None:  # noqa: B027 (some pack any shape)
        """PosttrainError where a layer of that shape (out, in) cannot be packed; asked before any work is done."""

    def solve_model(self, blocks: Iterable[Block], prepare: Prepare, done: Callable[[Block], None]) -> None:
        """Compress block after block. prepare: the transforms of the method, applied to a block before it is solved;
        done: called with each block that is finished, for progress and reports.

        A solver that works on several blocks at once overrides this, and holds as many as it needs.
        """
        for block in blocks:
            prepare(block)
            self.solve_block(block)
            done(block)

    @abstractmethod
    def solve_block(self, block: Block) -> None:
        """Install a packed layer for each of `block.linears`."""


@dataclass(frozen=True)
class LayerSolver(Solver):
    """Solves layer by layer, from the statistics of each layer's inputs.

    sequential: collect the statistics of a stage after the stages before it in the block are compressed (GPTQ's
    `true_sequential`); otherwise all of a block's at once.
    """

    sequential: bool = field(default=True, kw_only=True)

    @property
    def uses_data(self) -> bool:
        """Whether `solve` looks at the statistics."""
        return True

    @property
    def keep(self) -> int:
        """Token vectors that `solve` wants kept."""
        return 0

    @abstractmethod
    def solve(self, weight: Tensor, moments: InputMoments | None, bits: float | None, name: str) -> PackedWeight:
        """The packed weight of one layer.

        weight: `[out, in]` fp32. moments: of its inputs, None where the solver uses no data. bits: in place of the
        grid's, where an allocation says so. name: for messages.
        """

    def solve_block(self, block: Block) -> None:
        stages = block.phases if self.sequential else [[name for stage in block.stages for name in stage]]
        for stage in stages:
            moments = self.statistics(block, stage) if self.uses_data else {}
            for name in stage:
                given = (moments.get(name), block.bits.get(name), f"{block.name}.{name}")
                block.install(name, self.solve_linear(block.linears[name], *given))
            block.settle()

    def solve_linear(
        self, linear: nn.Linear, moments: InputMoments | None, bits: float | None, name: str
    ) -> PackedWeight:
        """As `solve`, for solvers that look at the bias too."""
        return self.solve(checked(linear.weight.detach().float(), name), moments, bits, name)

    def statistics(self, block: Block, stage: list[str]) -> dict[str, InputMoments]:
        return block.moments(stage, keep=self.keep)


def checked(weight: Tensor, name: str) -> Tensor:
    """The weight, if it is finite."""
    if not torch.isfinite(weight).all():
        raise PosttrainError(f"{name} holds weights that are not finite; nothing can be fitted to them")
    return weight
