"""Linear layers that multiply numbers of fewer bits than they are stored in: training in a precision that no hardware
at hand has, simulated in one that it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from posttrain.models.causal import CausalPolicy
from posttrain.models.float_format import FloatFormat
from posttrain.trajectory import PosttrainError

Passes = Literal["all", "forward", "backward"]


@dataclass(frozen=True)
class SimulatedPrecision:
    """What linear layers multiply is rounded to a format first: inputs and weights, and gradients of outputs.

    `Y = R(X) R(W)^T` in the forward pass, `dX = R(dY) R(W)` and `dW = R(dY)^T R(X)` in the backward pass. Sums are as
    precise as the model's own dtype makes them, and everything else (norms, softmax, embeddings, the vocabulary
    projection, the optimizer and its master weights) stays as it is. Nothing becomes faster by it.

    format: to which R rounds. bfloat16: numbers are rounded to bf16 before (as in training whose operands are in bf16,
        of which a narrower format then drops bits), which leaves those of a bf16 model as they are.
    passes: which products take rounded numbers; a single one shows what the other is worth.
    """

    format: FloatFormat
    bfloat16: bool = True
    passes: Passes = "all"

    def __post_init__(self) -> None:
        if self.passes not in ("all", "forward", "backward"):
            raise PosttrainError(f"passes is {self.passes!r}; expected all, forward or backward")
        if self.bfloat16 and self.format.mantissa > 7:
            raise PosttrainError(
                f"a mantissa of {self.format.mantissa} bits behind bf16, which has 7; set bfloat16: false, or take "
                f"fewer bits"
            )

    def __call__(self, numbers: Tensor) -> Tensor:
        """R: rounded numbers in the dtype that they came in."""
        return self.format(numbers.to(torch.bfloat16).to(numbers.dtype) if self.bfloat16 else numbers)

    @contextmanager
    def applied(self, policy: CausalPolicy) -> Iterator[None]:
        """The policy's linear layers multiply rounded numbers within a `with` block."""
        layers = linear_layers(policy)
        _ = policy.packs  # tried before: rounding would make packed rows and padded ones differ by more than it allows
        before = [layer.__dict__.get("forward") for layer in layers]
        for layer in layers:
            layer.forward = _Rounded(self, layer)  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            for layer, own in zip(layers, before, strict=True):
                if own is None:
                    del layer.__dict__["forward"]
                else:
                    layer.forward = own  # type: ignore[method-assign]


def linear_layers(policy: CausalPolicy) -> list[nn.Linear]:
    """The linear layers that a precision is simulated in: all but the vocabulary projection."""
    projection = policy.base.get_output_embeddings()
    found = [m for m in policy.model.modules() if type(m) is nn.Linear and m is not projection]
    if not found:
        raise PosttrainError(
            f"{policy.name} has no linear layer to simulate a precision in; expected a model whose blocks are made of "
            f"torch.nn.Linear"
        )
    return found


class _Rounded:
    """The forward pass of a linear layer in a simulated precision."""

    def __init__(self, precision: SimulatedPrecision, layer: nn.Linear) -> None:
        self.precision, self.layer = precision, layer

    def __call__(self, inputs: Tensor) -> Tensor:
        found: Tensor = _Product.apply(inputs, self.layer.weight, self.layer.bias, self.precision)
        return found


class _Product(torch.autograd.Function):
    """inputs `[..., in]`, weight `[out, in]`, bias `[out]` or None -> `[..., out]`."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, precision: SimulatedPrecision) -> Tensor:
        x, w = precision(inputs), precision(weight)
        there, back = precision.passes != "backward", precision.passes != "forward"
        ctx.precision, ctx.rounds = precision, back
        ctx.save_for_backward(x if back else inputs, w if back else weight)
        return F.linear(x, w, bias) if there else F.linear(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, w = ctx.saved_tensors
        dy = ctx.precision(gradient) if ctx.rounds else gradient
        wants_inputs, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        flat = dy.reshape(-1, dy.shape[-1])
        return (
            dy @ w if wants_inputs else None,
            flat.T @ x.reshape(-1, x.shape[-1]) if wants_weight else None,
            gradient.reshape(-1, gradient.shape[-1]).sum(0) if wants_bias else None,
            None,
        )
