"""Q-VLM: the ranges of activations, searched together for layers whose errors depend on each other."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from posttrain.compress.activations.ranges import RangeStep
from posttrain.compress.calls import Call, run
from posttrain.compress.experts import holder
from posttrain.compress.grids.grid import Grid
from posttrain.compress.grids.table import Table
from posttrain.compress.solvers.dependency import Partition
from posttrain.compress.solvers.rtn import rounded, with_bits
from posttrain.compress.solvers.solver import Prepare, Solver, checked
from posttrain.compress.walk import Block
from posttrain.trajectory import PosttrainError

Mode = Literal["joint", "released"]
Ratios = tuple[float, ...]


@dataclass(frozen=True)
class JointClipping(Solver):
    r"""Weights are rounded to nearest; then the ranges of the activations (`ChannelRanges`) are narrowed by ratios c.

    Layers that share an input are one here. Inside a transformer block, consecutive layers are joined where entropy
    says that they depend on each other (`Partition`); the ratios of joined layers are those, of all combinations, with
    which the last one's outputs come closest to those of the float layers on the same inputs, which the compressed
    layers before them give.

    grid: of the weights. ratios: what c may be; 1 is the whole range. vision_ratios: in blocks whose name matches one
    of `vision`, the towers that see, whose ranges belong to the places of an image in the place of channels.
    longest: layers that are joined at most. combinations: tried one and all up to so many; beyond them one ratio is
    moved at a time, `sweeps` times through. tokens: of the search. mode: `released` does as the released code does: no
    joint search, a layer's ratio loses least of its inputs (errors to the power 1/2) where its entropy is high, or
    every third time; others keep the whole range.

    Reference: Q-VLM, 2024, arXiv 2410.08119 (card 138).
    """

    grid: Grid = field(default_factory=Table)
    ratios: Ratios = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
    vision_ratios: Ratios = (1.0, 0.999, 0.998)
    vision: tuple[str, ...] = ("*vision*",)
    longest: int = 3
    combinations: int = 49
    sweeps: int = 2
    tokens: int = 4096
    mode: Mode = "joint"

    def __post_init__(self) -> None:
        if self.mode not in ("joint", "released"):
            raise PosttrainError(f"mode is {self.mode!r}; expected joint or released")
        if self.longest < 1 or not self.ratios or not self.vision_ratios:
            raise PosttrainError(
                f"longest is {self.longest}; expected blocks of 1 layer or more, and ratios to choose from"
            )

    def check(self, shape: tuple[int, int], name: str) -> None:
        self.grid.width(shape[1], name)

    def solve_model(self, blocks: Iterable[Block], prepare: Prepare, done: Callable[[Block], None]) -> None:
        partition = self.partition()
        for block in blocks:
            prepare(block)
            self._solve(block, partition)
            done(block)

    def solve_block(self, block: Block) -> None:
        self._solve(block, self.partition())

    def partition(self) -> Partition:
        """What joins the layers of one model."""
        return Partition(self.longest)

    def _solve(self, block: Block, partition: Partition) -> None:
        seeing = any(fnmatch.fnmatchcase(block.name, pattern) for pattern in self.vision)
        ratios = self.vision_ratios if seeing else self.ratios
        if seeing:
            position_ranges(block)
        steps = ranges_of(block)
        calls = first_calls(block.inputs, self.tokens)
        inputs = stage_inputs(block, calls)
        found = [steps[stage[0]](x) for stage, x in zip(block.stages, inputs, strict=True)]
        flat = [x.reshape(-1, x.shape[-1]) for x in found]
        if self.mode == "released":
            for number, (stage, x) in enumerate(zip(block.stages, inputs, strict=True)):
                self._install(block, stage)
                if partition.high_entropy(flat[number]) or number % 3 == 1:
                    narrow([steps[n] for n in stage], closest(steps[stage[0]], x, ratios))
            return
        for group in partition.joined(flat):
            search = Search(block, [block.stages[k] for k in group], calls)
            for stage in search.stages:
                self._install(block, stage)
            search.choose(ratios, self.combinations, self.sweeps)

    def _install(self, block: Block, names: Sequence[str]) -> None:
        for name in names:
            whole = f"{block.name}.{name}"
            weight = checked(block.linears[name].weight.detach().float(), whole)
            block.install(name, rounded(weight, with_bits(self.grid, block.bits.get(name)), whole))


class Search:
    """Ratios for the ranges of some consecutive stages of a block. Made while they are still float layers: what they
    give then is what is wanted.
    """

    def __init__(self, block: Block, stages: Sequence[list[str]], calls: Sequence[Call]) -> None:
        self.block, self.stages, self.calls = block, stages, calls
        steps = ranges_of(block)
        self.steps = [[steps[name] for name in stage] for stage in stages]
        self.whole = [[(step.low.clone(), step.high.clone()) for step in stage] for stage in self.steps]
        self.wanted = self.outputs()

    def outputs(self) -> list[Tensor]:
        """Of the last stage's layers, call after call; of experts, whose tokens may change, the block's."""
        if any(holder(self.block.module, name) for name in self.stages[-1]):
            return self.block.outputs(self.calls)
        return outputs_of(self.block.module, self.stages[-1], self.calls)

    def set(self, ratios: Sequence[float]) -> None:
        for ratio, steps, ends in zip(ratios, self.steps, self.whole, strict=True):
            for step, (low, high) in zip(steps, ends, strict=True):
                step.moved(ratio * low, ratio * high)

    def error(self, ratios: Sequence[float]) -> float:
        """Squared error of the last stage's outputs with these ratios."""
        self.set(ratios)
        pairs = zip(self.outputs(), self.wanted, strict=True)
        return sum(float((found.float() - wanted.float()).square().sum()) for found, wanted in pairs)

    def choose(self, ratios: Ratios, combinations: int, sweeps: int) -> tuple[float, ...]:
        """Sets the best ratios, the first ones among equals, and returns them."""
        count = len(self.stages)
        if len(ratios) ** count <= combinations:
            best = min(itertools.product(ratios, repeat=count), key=self.error)
        else:
            best = self._one_at_a_time(ratios, sweeps)
        self.set(best)
        return best

    def _one_at_a_time(self, ratios: Ratios, sweeps: int) -> tuple[float, ...]:
        best = (ratios[0],) * len(self.stages)
        least = self.error(best)
        for _ in range(sweeps):
            before = best
            for place in range(len(best)):
                for ratio in ratios:
                    tried = (*best[:place], ratio, *best[place + 1 :])
                    if tried != best and (error := self.error(tried)) < least:
                        best, least = tried, error
            if best == before:
                break
        return best


def ranges_of(block: Block) -> dict[str, RangeStep]:
    """The steps that round the inputs of a block's layers."""
    found = {name: step for name, step in block.quantizers.items() if isinstance(step, RangeStep)}
    if set(found) < set(block.linears):
        raise PosttrainError(
            "the joint search narrows ranges by channel; expected activations=ChannelRanges(...) beside it"
        )
    return found


def narrow(steps: Sequence[RangeStep], ratio: float) -> None:
    for step in steps:
        step.moved(ratio * step.low, ratio * step.high)


def closest(step: RangeStep, inputs: Tensor, ratios: Ratios) -> float:
    """The ratio with which the mean square root of the inputs' errors is least."""
    low, high = step.low.clone(), step.high.clone()

    def error(ratio: float) -> float:
        return float((step.moved(ratio * low, ratio * high)(inputs) - inputs).abs().sqrt().mean())

    best = min(ratios, key=error)
    step.moved(low, high)
    return best


def first_calls(calls: Sequence[Call], tokens: int) -> list[Call]:
    """The first calls, as many as hold at most so many tokens; one at least."""
    found: list[Call] = []
    for call in calls:
        count = call.hidden.shape[0] * call.hidden.shape[1]
        if found and count > tokens:
            break
        found.append(call)
        tokens -= count
    return found


def stage_inputs(block: Block, calls: Sequence[Call]) -> list[Tensor]:
    """The inputs of each stage, `[rows, places, channels]` of all calls; of one that nothing reached, zeros."""
    heads = [stage[0] for stage in block.stages]
    seen: dict[str, list[Tensor]] = {head: [] for head in heads}
    with _watched(block.module, heads, lambda name, given, out: seen[name].append(given)), torch.no_grad():
        for call in calls:
            run(block.module, call)
    empty = {head: torch.zeros(1, block.linears[head].in_features) for head in heads}
    return [torch.cat(seen[head]) if seen[head] else empty[head] for head in heads]


def outputs_of(module: nn.Module, names: Sequence[str], calls: Sequence[Call]) -> list[Tensor]:
    """What some layers of a block give, call after call; what comes behind them is not run."""
    found: list[Tensor] = []
    left: set[str] = set()

    def seen(name: str, given: Tensor, out: Tensor) -> None:
        found.append(out)
        left.discard(name)
        if not left:
            raise _Enough

    with _watched(module, names, seen), torch.no_grad():
        for call in calls:
            left = set(names)
            try:
                run(module, call)
            except _Enough:
                continue
    return found


def position_ranges(block: Block) -> None:
    """Put ranges by place of the sequence where those by channel are, from all calibration inputs."""
    names = list(block.linears)
    ends: dict[str, tuple[Tensor, Tensor]] = {}

    def seen(name: str, given: Tensor, out: Tensor) -> None:
        if given.ndim != 3 or (name in ends and len(ends[name][0]) != given.shape[1]):
            raise PosttrainError(
                f"{block.name}.{name} is given {tuple(given.shape)}; ranges by place need [images, places, channels] "
                f"and one number of places; set vision=() for ranges by channel"
            )
        values = given.float()
        low, high = values.amin((0, 2)), values.amax((0, 2))
        if name in ends:
            low, high = torch.minimum(low, ends[name][0]), torch.maximum(high, ends[name][1])
        ends[name] = (low, high)

    with _watched(block.module, names, seen), torch.no_grad():
        for call in block.inputs:
            run(block.module, call)
    for name, step in ranges_of(block).items():
        if name in ends:
            block.quantizers[name] = RangeStep.of_positions(*ends[name], step.width, step.bits)


class _Enough(Exception):
    """Ends the run of a block once what is looked at was seen."""


@contextmanager
def _watched(module: nn.Module, names: Sequence[str], seen: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside, `seen` is called with the name, input and output of each of these layers that runs."""

    def hook(name: str) -> Callable[..., None]:
        return lambda layer, given, out: seen(name, given[0], out)

    handles = [module.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
