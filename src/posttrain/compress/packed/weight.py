"""A weight matrix as it is stored in few bits: what every packed format has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.reward.names import unknown

FORMATS: dict[str, type[PackedWeight]] = {}


class PackedWeight(nn.Module, ABC):
    """A matrix `[out, in]` held as packed codes and the tables that give them their values, all of them buffers.

    What is in the buffers is what a file holds and what memory holds; nothing else is kept. A format is made from its
    solver's result by a constructor of its own, and from a file by `empty(shape, **settings())`, whose buffers have the
    right shapes and dtypes and wait for `load_state_dict`.

    shape: (out, in) of the matrix it stands for.
    """

    format: ClassVar[str]

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = (int(shape[0]), int(shape[1]))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "format" in cls.__dict__:
            FORMATS[cls.format] = cls

    @abstractmethod
    def dequantize(self) -> Tensor:
        """`[out, in]` fp32: the values that the codes stand for."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What beside the shape decides the buffers' shapes and meaning: JSON values, the arguments of `empty`."""

    @classmethod
    @abstractmethod
    def empty(cls, shape: tuple[int, int], **settings: Any) -> PackedWeight:
        """One of that shape and those settings with buffers of zeros."""

    @property
    @abstractmethod
    def counted_bits(self) -> float:
        """Bits that the format's formula says the matrix takes: codes, scales, zero points, tables, indices, masks.

        Written from the bit count, not from the buffers: a test holds that both agree.
        """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        """Goes along to another device, but not to another precision: scales stay what the codes were found with."""

        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        return super()._apply(moved, recurse)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the buffers, in memory as on disk."""
        return sum(b.numel() * b.element_size() for b in self.buffers())

    @property
    def bits_per_weight(self) -> float:
        return self.counted_bits / (self.shape[0] * self.shape[1])

    def product(self, inputs: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`: inputs times the transposed matrix, in the inputs' dtype.

        A format with a kernel of its own multiplies by the codes; others by the dequantized values.
        """
        return F.linear(inputs, self.dequantize().to(inputs.dtype))

    def __matmul__(self, other: Tensor) -> Tensor:
        """Times `[..., in, n]`, for blocks that use a layer's weight without calling the layer (Mamba's dt_proj)."""
        return self.dequantize().to(other.dtype) @ other

    def extra_repr(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]}, {self.bits_per_weight:.3f} bits a weight"


def written(weight: PackedWeight) -> dict[str, Any]:
    """The format, shape and settings of a packed weight as JSON values; `from_written` is its inverse."""
    return {"format": weight.format, "shape": list(weight.shape), **weight.settings()}


def from_written(described: dict[str, Any]) -> PackedWeight:
    """An empty packed weight of a description, ready for `load_state_dict`."""
    settings = dict(described)
    name, shape = settings.pop("format"), settings.pop("shape")
    if name not in FORMATS:
        raise unknown("weight format", name, FORMATS)
    return FORMATS[name].empty((shape[0], shape[1]), **settings)
