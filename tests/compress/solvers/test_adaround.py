"""Learned rounding: the float weights at first, up or down in the end, and nearly the best of all ways."""

from __future__ import annotations

import itertools
from typing import Literal

import pytest
import torch

from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.compress.solvers.adaround import (
    AdaRound,
    BlockRounding,
    Commitment,
    LearnedRounding,
    logits_of,
    quadratic,
    stretched,
)
from posttrain.compress.solvers.gptq import GPTQ
from posttrain.compress.solvers.learned import fake_quantized, fitted
from posttrain.compress.solvers.rtn import RoundToNearest, rounded
from posttrain.trajectory import PosttrainError
from tiny_blocks import GROUP, compressed, divergence, logits, text, tiny, weights


def soft(weight: torch.Tensor, grid: Uniform, **options: object) -> LearnedRounding:
    scale, zero = fitted(weight, grid, "w")
    arguments = {"rate": 0.05, "commitment": Commitment(), **options}
    return LearnedRounding(weight, scale, zero, grid.bits, grid.zero, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("zero", ["none", "integer", "float"])
def test_soft_at_first_it_gives_the_float_weights(zero: str) -> None:
    torch.manual_seed(0)
    weight, grid = torch.randn(6, 64), Uniform(4, 16, zero)  # type: ignore[arg-type]
    found = soft(weight, grid)
    by_group, scale, zeros = weight.view(6, 4, 16), found.start[..., None], found.zero[..., None]
    floor = ((by_group - zeros) / scale).floor() if zero == "float" else (by_group / scale).floor() + zeros
    codes = floor.view(6, 64)
    inside = (codes >= 0) & (codes < 15)
    assert float(inside.float().mean()) > 0.8
    torch.testing.assert_close(found()[inside], weight[inside], atol=1e-4, rtol=0)


@pytest.mark.parametrize("zero", ["none", "integer", "float"])
@pytest.mark.parametrize("rank", [0, 3])
def test_hardened_at_first_it_is_rounding_to_nearest(zero: str, rank: int) -> None:
    torch.manual_seed(0)
    weight, grid = torch.randn(6, 64), Uniform(3, 16, zero)  # type: ignore[arg-type]
    made = soft(weight, grid, rank=rank)
    found, wanted = made.pack(), rounded(weight, grid, "w")
    assert isinstance(found, UniformWeight)
    assert torch.equal(found.codes, wanted.codes)  # type: ignore[arg-type]
    made.committed = True
    assert torch.equal(made().detach(), found.dequantize())


def test_the_stretched_sigmoid() -> None:
    assert stretched(torch.tensor([-10.0, 0.0, 10.0])).tolist() == [0.0, 0.5, 1.0]
    share = torch.tensor([0.0, 0.1, 0.5, 0.99])
    torch.testing.assert_close(stretched(logits_of(share)), share)


def test_the_gradient_of_a_rounding_by_hand() -> None:
    """∂ŵ/∂V = s 1.2 σ'(V) where h is not clipped."""
    made = soft(torch.tensor([[0.0, 0.4, 1.0, 3.0]]), Uniform(2, 0))  # s = 1, and 0.4 leaves a fraction of 0.4
    made().sum().backward()
    assert made.logits.grad is not None
    share = torch.sigmoid(made.logits.detach()[0, 1])
    assert made.logits.grad[0, 1].item() == pytest.approx(float(1.2 * share * (1 - share)), rel=1e-3)


def test_commitment_anneals_after_a_warm_up() -> None:
    made = Commitment(2.0)
    assert made(torch.tensor([0.5]), 0.1) is None
    assert [made.power(p) for p in (0.2, 0.6, 1.0)] == pytest.approx([20.0, 11.0, 2.0])
    assert made(torch.tensor([0.0, 0.25, 0.5, 1.0]), 1.0).item() == pytest.approx(2 * (0.75 + 1.0))  # type: ignore[union-attr]
    assert Commitment(0.0)(torch.tensor([0.5]), 1.0) is None


def test_the_quadratic_error_and_its_gradient() -> None:
    torch.manual_seed(0)
    x, difference = torch.randn(20, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    value, wanted = quadratic(difference, x.T @ x), ((x @ difference.T) ** 2).sum()
    assert value.item() == pytest.approx(wanted.item())
    one, other = (torch.autograd.grad(v, difference)[0] for v in (value, wanted))
    torch.testing.assert_close(one, other)


def moments(x: torch.Tensor) -> InputMoments:
    made = InputMoments(x.shape[1])
    made.add(x)
    return made


def test_finds_the_best_of_all_roundings_of_a_small_layer() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 1) + 0.5 * torch.randn(200, 8)  # inputs that go together: errors must cancel
    weight, grid = torch.randn(4, 8), Uniform(3, 0)
    found = AdaRound(grid=grid, steps=400).solve(weight, moments(x), None, "w").dequantize()
    scale, zero = fitted(weight, grid, "w")
    floor = torch.floor(weight / scale)
    best, near = [], []
    for row in range(4):
        errors = []
        for up in itertools.product((0.0, 1.0), repeat=8):
            codes = (floor[row] + torch.tensor(up) + zero[row]).clamp(0, 7)
            errors.append(float(((x @ ((codes - zero[row]) * scale[row] - weight[row])) ** 2).sum()))
        best.append(min(errors))
        near.append(float(((x @ (rounded(weight, grid, "w").dequantize() - weight)[row]) ** 2).sum()))
    got = ((x @ (found - weight).T) ** 2).sum(0)
    assert float(got.sum()) < 1.05 * sum(best)
    assert sum(near) > 1.4 * sum(best)


def test_no_steps_is_rounding_to_nearest_and_steps_lose_less() -> None:
    torch.manual_seed(1)
    mixing = torch.randn(32, 32)
    x, weight, grid = torch.randn(300, 32) @ mixing, torch.randn(16, 32), Uniform(3, 16)
    loss = {}
    for steps in (0, 200):
        made = AdaRound(grid=grid, steps=steps).solve(weight, moments(x), None, "w").dequantize()
        loss[steps] = float(((x @ (made - weight).T) ** 2).sum())
    nearest = rounded(weight, grid, "w").dequantize()
    assert loss[0] == pytest.approx(float(((x @ (nearest - weight).T) ** 2).sum()), rel=1e-5)
    assert loss[200] < 0.6 * loss[0]
    feedback = GPTQ(grid=grid).solve(weight, moments(x), None, "w").dequantize()
    assert loss[200] < float(((x @ (feedback - weight).T) ** 2).sum())


def test_a_block_is_rounded_better_than_to_nearest() -> None:
    batches = text(4)
    one = {"num_hidden_layers": 1}
    truth, grid = logits(tiny(**one), batches), Uniform(3, GROUP)
    near = divergence(compressed(tiny(**one), RoundToNearest(grid), batches), truth, batches)
    assert divergence(compressed(tiny(**one), BlockRounding(grid, 6, rate=0.2), batches), truth, batches) < 0.95 * near


def test_blocks_without_training_are_rounded_to_nearest() -> None:
    found = weights(compressed(tiny(), BlockRounding(Uniform(3, GROUP), 0)))
    wanted = weights(compressed(tiny(), RoundToNearest(Uniform(3, GROUP))))
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_outputs_may_be_weighed_by_their_squared_gradients() -> None:
    batches = text()
    found = compressed(tiny(), BlockRounding(Uniform(3, GROUP), 2, fisher=True), batches)
    plain = compressed(tiny(), BlockRounding(Uniform(3, GROUP), 2), batches)
    assert any(not torch.equal(a, b) for a, b in zip(weights(found).values(), weights(plain).values(), strict=True))
    with pytest.raises(PosttrainError, match="fisher"):
        BlockRounding(Uniform(3, GROUP), targets=("prefix",), fisher=True)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("kind", ["none", "integer", "float"])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_step_beside_what_defines_it(kind: Literal["none", "integer", "float"], rank: int, bits: int) -> None:
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
