"""Linear layers on packed weights, and float ones whose inputs are changed first."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.compress.packed.weight import PackedWeight


class PackedLinear(nn.Module):
    """`y = inputs(x) W^T + b` with W packed.

    weight: the packed matrix. bias: `[out]` or None. inputs: a chain of `InputStep`s, or None.
    """

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None, inputs: nn.Sequential | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.out_features, self.in_features = weight.shape
        self.bias: Tensor | None
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.inputs = inputs

    def forward(self, x: Tensor) -> Tensor:
        if self.inputs is not None:
            x = self.inputs(x)
        y = self.weight.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class TransformedLinear(nn.Linear):
    """A float linear layer whose inputs go through a chain of steps first, as a transform that works at run time asks.

    Its weight is that of the transformed layer: `y = inputs(x) W'^T + b`. When it is packed the chain stays.
    """

    inputs: nn.Sequential

    @classmethod
    def of(cls, linear: nn.Linear, inputs: nn.Sequential) -> TransformedLinear:
        """The layer with the same parameters and a chain before it (behind any that it has already)."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.in_features, made.out_features = linear.in_features, linear.out_features
        made.weight, made.bias = linear.weight, linear.bias
        already = list(linear.inputs) if isinstance(linear, TransformedLinear) else []
        made.inputs = nn.Sequential(*already, *inputs)
        return made

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inputs(x), self.weight, self.bias)
