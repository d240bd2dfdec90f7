"""Learned clipping: its range, its gradient, how it is stored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.packed.levels import LevelsWeight
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.compress.solvers.omniquant import ClippedRange, LearnedClipping
from posttrain.compress.solvers.rtn import rounded
from posttrain.trajectory import PosttrainError
from tiny_blocks import GROUP, compressed, divergence, floats, logits, text, tiny, weights


def test_starts_at_the_logistic_of_four_of_the_range() -> None:
    weight = torch.tensor([[-1.0, 0.5, 2.0, 0.0]])
    scale, zero = ClippedRange(weight, 2, 1).levels()
    share = 1 / (1 + torch.exp(torch.tensor(-4.0)))
    assert scale.item() == pytest.approx((3.0 * share / 3).half().item())
    assert zero.item() == 1.0


def test_without_clipping_it_is_rounding_to_nearest() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 64)
    found = ClippedRange(weight, 3, 2, start=30.0).pack()
    wanted = rounded(weight, Uniform(3, 32), "w")
    assert isinstance(found, UniformWeight)
    assert torch.equal(found.codes, wanted.codes)
    assert torch.equal(found.dequantize(), wanted.dequantize())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("levels", [0, 5])
def test_what_is_packed_is_what_was_trained(symmetric: bool, levels: int) -> None:
    torch.manual_seed(0)
    soft = ClippedRange(torch.randn(6, 64), 2, 2, levels=levels, symmetric=symmetric)
    for parameter in soft.parameters():
        nn.init.normal_(parameter)
    assert torch.equal(soft.pack().dequantize(), soft().detach())


def test_the_gradient_of_the_clipping_by_hand() -> None:
    """One group [-1, 0.2, 3], two bits: by the chain of σ, s = (hi - lo)/3 and the codes; z is a constant."""
    weight = torch.tensor([[-1.0, 0.2, 3.0]])
    soft = ClippedRange(weight, 2, 1, start=0.0)  # hi = 1.5, lo = -0.5, s = 2/3, z = 1
    upstream = torch.tensor([[1.0, 10.0, 100.0]])
    (soft() * upstream).sum().backward()
    scale = float(torch.tensor(2 / 3).half())
    # -1 -> code -1 clipped to 0: (0 - 1) = -1; 0.2 -> round(.3) + 1 = 1: 0 - 0.3; 3 -> code 5 clipped to 3: 3 - 1 = 2
    by_scale = 1.0 * -1 + 10.0 * (0 - 0.2 / scale) + 100.0 * 2
    assert soft.upper.grad is not None and soft.lower.grad is not None  # noqa: PT018
    assert soft.upper.grad.item() == pytest.approx(by_scale / 3 * 3.0 * 0.25, rel=1e-5)
    assert soft.lower.grad.item() == pytest.approx(-by_scale / 3 * -1.0 * 0.25, rel=1e-5)


def test_groups_of_one_sign_keep_their_range_and_get_a_float_zero() -> None:
    weight = torch.linspace(5.0, 6.0, 16)[None].repeat(2, 1)
    found = ClippedRange(weight, 4, 1, start=30.0).pack()
    assert isinstance(found, UniformWeight)
    assert found.kind == "float"  # the range is not extended to hold 0, which would leave 16 levels from 0 to 6
    assert float((found.dequantize() - weight).abs().max().detach()) < 1 / 25


def test_symmetric_levels() -> None:
    """-(2^(b-1) - 1) to 2^(b-1), as the reference has them."""
    weight = torch.tensor([[-3.0, 1.0, 2.0, 4.0]])
    found = ClippedRange(weight, 3, 1, symmetric=True, start=30.0).pack()
    scale = float(torch.tensor(4 / 3).half())
    assert torch.allclose(found.dequantize(), torch.tensor([[-2 * scale, scale, scale * 2, 3 * scale]]))
    with pytest.raises(PosttrainError, match="1 bit"):
        ClippedRange(weight, 1, 1, symmetric=True)


def test_constant_groups_stay() -> None:
    weight = torch.cat([torch.zeros(1, 8), torch.full((1, 8), 0.25)])
    found = ClippedRange(weight, 2, 1, start=30.0).pack().dequantize()
    assert float((found - weight).abs().max()) < 1e-4


def test_five_levels_take_seven_bits_for_three() -> None:
    torch.manual_seed(0)
    found = ClippedRange(torch.randn(64, 576), 2, 9, levels=5).pack()
    assert isinstance(found, LevelsWeight)
    assert int(found.unpacked().max()) == 4
    assert found.bits_per_weight == pytest.approx(7 / 3 + (16 + 7 / 3) / 64, rel=1e-3)


def test_training_beats_its_start_and_follows_the_seed() -> None:
    one = {"num_hidden_layers": 1}
    batches, grid = text(), Uniform(2, GROUP)
    truth = logits(tiny(**one), batches)

    def made(epochs: int) -> nn.Module:
        return compressed(tiny(**one), LearnedClipping(grid, epochs, rate=0.3), batches)

    first, second = made(5), made(5)
    assert divergence(first, truth, batches) < divergence(made(0), truth, batches)
    assert all(torch.equal(weights(first)[n], weights(second)[n]) for n in floats(tiny(**one)))
