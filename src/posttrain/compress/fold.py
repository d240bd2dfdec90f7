"""Folding: a scale or a shift of channels, moved into the layers next to it so that nothing changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Read:
    """A parameter that channels are multiplied by (or that writes them). axis: the one that runs over the channels."""

    parameter: str
    axis: int


@dataclass(frozen=True)
class NormSite:
    """A norm, and all that reads its output.

    norm: its name in the block. offset: its gain is `offset + weight` (1 in Gemma). bias: whether it adds one.
    linears: the linear layers that read it, and others: what else does (a router).
    """

    norm: str
    offset: float
    bias: bool
    linears: tuple[str, ...]
    others: tuple[Read, ...] = ()

    def gain(self, now: Parameters) -> Tensor:
        """`[width]` what the normed channels are multiplied by."""
        return now[f"{self.norm}.weight"].float() + self.offset

    def scaled(self, now: Parameters, scale: Tensor, shift: Tensor | None = None) -> dict[str, Tensor]:
        """Parameters, by name, with which the norm gives `(x - shift) / scale` and all that reads it undoes that."""
        changed = {f"{self.norm}.weight": self.gain(now) / scale - self.offset}
        if self.bias:
            bias = now[f"{self.norm}.bias"].float()
            changed[f"{self.norm}.bias"] = (bias if shift is None else bias - shift) / scale
        for name in self.linears:
            weight = now[f"{name}.weight"].float()
            changed[f"{name}.weight"] = weight * scale
            if shift is not None:  # by the weight as it was: the shift is taken off before the scale
                old = now.get(f"{name}.bias")
                changed[f"{name}.bias"] = weight @ shift if old is None else old.float() + weight @ shift
        for read in self.others:
            changed[read.parameter] = along(now[read.parameter].float(), read.axis, scale)
        return changed


@dataclass(frozen=True, eq=False)
class Pair:
    """Two linear layers with nothing between them that a positive scale of single channels does not pass through.

    rows: `[m]` the rows of `first` (all of them, or the part of a fused layer) that become the inputs of `second`.
    source: `[in of second]` which of the `rows` each column comes from; several come from one where heads share values.
    attention: whether attention lies between, so that channels of a head belong together.
    """

    first: str
    second: str
    rows: Tensor
    source: Tensor
    attention: bool

    @property
    def one_to_one(self) -> bool:
        return len(self.rows) == len(self.source)

    def scaled(self, now: Parameters, scale: Tensor) -> dict[str, Tensor]:
        """Parameters with which the second layer reads its inputs divided by `scale`, `[m]`, and undoes that."""
        changed = {}
        for name in (f"{self.first}.weight", f"{self.first}.bias"):
            if (value := now.get(name)) is not None:
                value = value.float().clone()
                value[self.rows] = along(value[self.rows], 0, 1 / scale)
                changed[name] = value
        changed[f"{self.second}.weight"] = now[f"{self.second}.weight"].float() * scale[self.source]
        return changed


def parameters(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters by name, detached."""
    return {name: p.detach() for name, p in module.named_parameters()}


@torch.no_grad()
def change(module: nn.Module, changes: Parameters) -> None:
    """Give parameters other values, in their own precision; a linear layer that has no bias yet gets one."""
    for name, value in changes.items():
        parent, _, last = name.rpartition(".")
        owner = module.get_submodule(parent)
        now = getattr(owner, last)
        if now is not None:
            now.copy_(value)
        else:
            weight: Any = owner.weight
            setattr(owner, last, nn.Parameter(value.to(weight), requires_grad=weight.requires_grad))


def along(value: Tensor, axis: int, scale: Tensor) -> Tensor:
    """A tensor times `[n]` numbers along an axis of n."""
    return value * scale.reshape([-1 if i == axis else 1 for i in range(value.ndim)])
