"""NUPES: soft codes at first and hard ones in the end, gradients by hand, and what training gains."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.compress.grids.power import Power
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.packed.table import TableWeight
from posttrain.compress.solvers.adaround import BlockRounding
from posttrain.compress.solvers.nupes import HARD, SOFT, LearnedPower, PowerCodes, power_values, soft_rounded
from posttrain.compress.solvers.rtn import RoundToNearest, rounded
from posttrain.trajectory import PosttrainError
from tiny_blocks import compressed, divergence, logits, text, tiny, weights

pytestmark = pytest.mark.limit("nupes")


def soft(bits: int = 4, exponent: float | None = 0.6, **rates: float) -> PowerCodes:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    return PowerCodes(weight, Power(bits, 0, exponent), **{"rate": 0.01, "exponent_rate": 0.001, **rates})


def test_a_soft_rounding_is_exact_at_whole_numbers_and_halfway() -> None:
    numbers = torch.tensor([-2.0, -1.5, 0.0, 0.5, 3.0])
    for sharpness in (SOFT, HARD):
        assert torch.allclose(soft_rounded(numbers, sharpness), numbers, atol=1e-6)
    shares = torch.tensor([0.3, 0.7, -0.3])
    assert torch.allclose(soft_rounded(shares, HARD), shares.round(), atol=1e-4)
    rising = soft_rounded(torch.linspace(-2, 2, 401), 8.0)
    assert (rising[1:] >= rising[:-1] - 1e-6).all()


def test_at_first_hardened_it_is_the_power_grid() -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    made, wanted = soft(), rounded(weight, Power(4, 0, 0.6), "w")
    found = made.pack()
    assert isinstance(found, TableWeight)
    assert torch.equal(found.codes, wanted.codes)  # type: ignore[arg-type]
    assert torch.equal(found.dequantize(), wanted.dequantize())
    made.committed = True
    assert torch.allclose(made().detach(), found.dequantize(), atol=1e-6)


def test_a_soft_start_is_close_to_the_float_weights() -> None:
    made = soft(8, 0.7)
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    assert float((made().detach() - weight).norm() / weight.norm()) < 0.01


def test_the_gradient_of_the_exponent_by_hand() -> None:
    shares = torch.tensor([[0.0, 0.5, -0.25, 1.0]], dtype=torch.float64)
    exponent = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([[2.0]], dtype=torch.float64)
    values = power_values(shares, scale, exponent)
    assert values.tolist()[0] == pytest.approx([0.0, 2 * 0.5 ** (1 / 0.6), -2 * 0.25 ** (1 / 0.6), 2.0])
    for place in range(4):
        (found,) = torch.autograd.grad(values[0, place], exponent, retain_graph=True)
        size = abs(float(shares[0, place]))
        wanted = -2 * 0.6**-2 * size ** (1 / 0.6) * math.log(size) if size > 0 else 0.0
        assert float(found) == pytest.approx(math.copysign(wanted, float(shares[0, place]) * wanted or 1.0), abs=1e-9)
    assert torch.autograd.gradcheck(lambda a: power_values(shares, scale, a), (exponent,))


def test_gradients_are_finite_at_codes_of_zero_and_at_the_ends() -> None:
    made = PowerCodes(torch.tensor([[0.0, 1.0, -1.0, 0.01]]), Power(3, 0, 1.2), rate=0.01, exponent_rate=0.01)
    made().sum().backward()
    for parameter in (made.latent, made.exponent):
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()


def test_sharpness_rises_after_a_fifth_of_the_steps() -> None:
    made = soft()
    found = []
    for progress in (0.0, 0.2, 0.6, 1.0):
        assert made.penalty(progress) is None
        found.append(made.sharpness)
    assert found == pytest.approx([SOFT, SOFT, (SOFT + HARD) / 2, HARD])


def test_codes_may_travel_over_the_whole_range() -> None:
    made = soft()
    with torch.no_grad():
        made.latent.add_(5.0)
    assert int(made.hard().max()) == 7
    assert int((made.hard() - soft().hard()).max()) == 5


def test_without_training_it_is_the_power_grid() -> None:
    found = weights(compressed(tiny(), LearnedPower(Uniform(4, 0), 0)))
    wanted = weights(compressed(tiny(), RoundToNearest(Power(4, 0))))
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_training_gains_of_codes_and_of_the_exponent_alone() -> None:
    batches = text(4)
    truth = logits(tiny(), batches)
    start = divergence(compressed(tiny(), RoundToNearest(Power(3, 0)), batches), truth, batches)
    both = divergence(compressed(tiny(), LearnedPower(Uniform(3, 0), 12, rate=0.05), batches), truth, batches)
    alone = compressed(tiny(), LearnedPower(Uniform(3, 0), 12, rate=0.0, exponent_rate=0.01), batches)
    assert both < 0.7 * start
    assert divergence(alone, truth, batches) < 1.0 * start


def test_it_beats_learned_rounding_on_even_levels() -> None:
    batches = text(4)
    truth = logits(tiny(), batches)
    power = divergence(compressed(tiny(), LearnedPower(Uniform(3, 0), 12, rate=0.05), batches), truth, batches)
    even = divergence(compressed(tiny(), BlockRounding(Uniform(3, 0, "none"), 12), batches), truth, batches)
    assert power < even


def test_what_there_is_not() -> None:
    with pytest.raises(PosttrainError, match="expected one above 0"):
        LearnedPower(rate=0.0, exponent_rate=0.0)
    with pytest.raises(PosttrainError, match=r"expected 0\.2 to 1\.2"):
        LearnedPower(Uniform(4, 0), exponent=2.0)
