"""What a search over transforms looks at: a part of a block with what it is given, run again with changed weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from posttrain.compress.calls import Call, run
from posttrain.compress.experts import shown_all
from posttrain.compress.fold import Parameters
from posttrain.compress.grids.grid import Grid
from posttrain.compress.walk import Block

T = TypeVar("T")


class Part:
    """The smallest module of a block that holds some of its layers, and what it gave on a few of the block's calls.

    layers: their names in the block. calls: those of the block that are looked at. until: a layer inside whose input
    is compared in place of the module's output.
    An expert to which none of their tokens is sent is shown all of them.
    outputs: call by call, of the weights as they are.
    """

    @torch.no_grad()
    def __init__(self, block: Block, layers: Sequence[str], calls: Sequence[Call], *, until: str | None = None) -> None:
        self.name = _holder(block.module, layers)
        self.module = block.module.get_submodule(self.name)
        self._until = self._local(until) if until is not None and self._holds(until) else None
        self._given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def watch(module: nn.Module, given: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self._given.append((given, keywords))

        hook = self.module.register_forward_pre_hook(watch, with_kwargs=True)
        try:
            for call in calls:
                run(block.module, call)
            if not self._given:  # an expert that none of these tokens was sent to
                with shown_all(block.module, layers):
                    for call in calls:
                        run(block.module, call)
        finally:
            hook.remove()
        self.outputs = list(self._run({}, {}))
        self._numbers = sum(wanted.numel() for wanted in self.outputs)

    def error(
        self,
        changes: Parameters,
        inputs: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
        *,
        least: float = math.inf,
    ) -> float:
        """Mean squared error of the outputs with parameters changed, and inputs of layers put through functions.

        least: of interest; infinity as soon as it is clear that the error is above it.
        """
        if type(self.module) is nn.Linear and list(changes) == [f"{self.name}.weight"] and not inputs:
            change = self._cast(changes)[f"{self.name}.weight"].float() - self.module.weight.detach().float()
            return float(((change @ self._gram) * change).sum(dtype=torch.float64)) / self._numbers
        total = 0.0
        with closing(self._run(changes, inputs or {})) as found:
            for now, wanted in zip(found, self.outputs, strict=True):
                total += float((now - wanted).double().square().sum())
                if total / self._numbers > least:
                    return math.inf
        return total / self._numbers

    @cached_property
    @torch.no_grad()
    def _gram(self) -> Tensor:
        """`[in, in]` fp32 of the inputs of a part that is a linear layer: its error needs nothing else of them."""
        total = torch.zeros(())
        for (given, *_), _ in self._given:
            rows = given.reshape(-1, given.shape[-1]).float()
            total = total + rows.T @ rows
        return total

    @torch.no_grad()
    def _run(self, changes: Parameters, inputs: Mapping[str, Callable[[Tensor], Tensor]]) -> Generator[Tensor]:
        """Outputs (or what reaches `until`), call by call."""
        caught: list[Tensor] = []
        hooks = [
            self.module.get_submodule(self._local(name)).register_forward_pre_hook(
                lambda module, given, change=change: (change(given[0]), *given[1:])
            )
            for name, change in inputs.items()
        ]
        if self._until is not None:
            hooks.append(
                self.module.get_submodule(self._until).register_forward_pre_hook(
                    lambda module, given: caught.append(given[0].float())
                )
            )
        local = {self._local(name): value for name, value in self._cast(changes).items()}
        try:
            for given, keywords in self._given:
                out = functional_call(self.module, local, given, keywords)
                yield caught.pop() if self._until is not None else (out[0] if isinstance(out, tuple) else out).float()
        finally:
            for hook in hooks:
                hook.remove()

    def _cast(self, changes: Parameters) -> dict[str, Tensor]:
        dtype = next(self.module.parameters()).dtype
        return {name: value.to(dtype) for name, value in changes.items()}

    def _holds(self, name: str) -> bool:
        return name == self.name or name.startswith(f"{self.name}.") or not self.name

    def _local(self, name: str) -> str:
        return name.removeprefix(self.name).removeprefix(".")


def best(tried: Sequence[T], loss: Callable[[T, float], float]) -> T:
    """The one of least loss, the first of equals.

    loss: of one of them; it may be infinity where it is above the number given, the least so far. They are tried from
    the middle outwards, since the first and the last are seldom the best and so need not be computed to their end.
    """
    least, found = math.inf, 0
    for place in sorted(range(len(tried)), key=lambda i: abs(i - len(tried) // 2)):
        now = loss(tried[place], least)
        if (now, place) < (least, found):
            least, found = now, place
    return tried[found]


def leading(calls: Sequence[Call], tokens: int) -> list[Call]:
    """As many calls from the first on as together hold that many tokens; all of them where they hold less."""
    found, seen = [], 0
    for call in calls:
        if seen >= tokens:
            break
        found.append(call)
        seen += call.hidden.shape[:-1].numel()
    return found


def rounded(weight: Tensor, grid: Grid, name: str) -> Tensor:
    """`[out, in]` fp32 -> the nearest values of a scalar grid, all groups at once."""
    groups = weight.reshape(-1, grid.width(weight.shape[1], name))
    return grid.settled(weight).fit(groups).rounded(groups).reshape(weight.shape)


def _holder(block: nn.Module, layers: Sequence[str]) -> str:
    """The innermost module around some layers that is itself called (a list of modules is not)."""
    names = [name.split(".") for name in layers]
    parts = [part for place, part in enumerate(names[0]) if all(n[: place + 1] == names[0][: place + 1] for n in names)]
    while parts and isinstance(block.get_submodule(".".join(parts)), nn.ModuleList | nn.ModuleDict):
        parts = parts[:-1]
    return ".".join(parts)
