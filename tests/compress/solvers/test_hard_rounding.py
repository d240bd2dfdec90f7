"""Rounding that trains what is stored: one function beside the operations that define it."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.solvers.adaround import Commitment, LearnedRounding
from posttrain.compress.solvers.learned import fake_quantized, fitted


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("kind", ["none", "integer", "float"])
@pytest.mark.parametrize("bits", [2, 4])
def test_values_and_gradients(kind: Literal["none", "integer", "float"], rank: int, bits: int) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 32, generator=draw)
    scale, zero = fitted(weight, Uniform(bits, 8, kind, "mse"), "layer")  # ends that are clipped have another gradient
    made = LearnedRounding(
        weight, scale, zero, bits, kind, rate=0.1, commitment=Commitment(0.0), rank=rank, step_rate=0.01, hard=True,
        draw=draw,
    )  # fmt: skip
    with torch.no_grad():
        learned = made.down if rank else made.logits
        learned.add_(torch.randn(learned.shape, generator=draw))
        made.factor.mul_(1.1)
    found = made()

    scale = made.scale()
    _, taken = made.rounding(scale)
    wanted = fake_quantized(weight, scale, zero, 2**bits - 1, float_zero=kind == "float", delta=taken)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.detach(), made.pack().dequantize(), atol=1e-6, rtol=1e-6)

    given = torch.randn(weight.shape, generator=draw)
    learned = [p for group in made.groups() for p in group["params"]]
    for one, other in zip(
        torch.autograd.grad((found * given).sum(), learned), torch.autograd.grad((wanted * given).sum(), learned),
        strict=True,
    ):  # fmt: skip
        assert other.abs().sum() > 0
        torch.testing.assert_close(one, other)
