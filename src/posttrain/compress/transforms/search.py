"""What a search over transforms looks at: a part of a block with what it is given, run again with changed weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from posttrain.compress.calls import Call, run
from posttrain.compress.fold import Parameters
from posttrain.compress.grids.grid import Grid
from posttrain.compress.walk import Block


class Part:
    """The smallest module of a block that holds some of its layers, and what it gave on a few of the block's calls.

    layers: their names in the block. calls: those of the block that are looked at. until: a layer inside whose input
    is compared in place of the module's output.
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
        finally:
            hook.remove()
        self.outputs = self._run({}, {})

    def error(self, changes: Parameters, inputs: Mapping[str, Callable[[Tensor], Tensor]] | None = None) -> float:
        """Mean squared error of the outputs with parameters changed, and inputs of layers put through functions."""
        found = self._run(changes, inputs or {})
        total = sum(
            float((now - wanted).double().square().sum()) for now, wanted in zip(found, self.outputs, strict=True)
        )
        return total / sum(wanted.numel() for wanted in self.outputs)

    @torch.no_grad()
    def _run(self, changes: Parameters, inputs: Mapping[str, Callable[[Tensor], Tensor]]) -> list[Tensor]:
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
        local = {self._local(name): value for name, value in changes.items()}
        try:
            for given, keywords in self._given:
                out = functional_call(self.module, self._cast(local), given, keywords)
                if self._until is None:
                    caught.append((out[0] if isinstance(out, tuple) else out).float())
        finally:
            for hook in hooks:
                hook.remove()
        return caught

    def _cast(self, changes: Parameters) -> dict[str, Tensor]:
        dtype = next(self.module.parameters()).dtype
        return {name: value.to(dtype) for name, value in changes.items()}

    def _holds(self, name: str) -> bool:
        return name == self.name or name.startswith(f"{self.name}.") or not self.name

    def _local(self, name: str) -> str:
        return name.removeprefix(self.name).removeprefix(".")


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
