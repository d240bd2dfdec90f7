"""Ranges between quantiles, and dual clipping: against computations written here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from posttrain.compress.activations.dual_clip import learned_ends, soft_rounded
from posttrain.compress.activations.percentile import Percentile, affine, least_ends, quantile, rounded
from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.inputs import chain, from_written, written
from posttrain.trajectory import PosttrainError


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(x: torch.Tensor) -> InputMoments:
    found = InputMoments(x.shape[-1], gram=False, keep=4096)
    found.add(x)
    return found


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_quantiles_are_those_of_numpy(count: int) -> None:
    x = draw(3, count)
    for p in (0.0, 0.3, 0.999, 1.0):
        found = quantile(x.sort(-1).values, p)
        assert found.numpy() == pytest.approx(np.quantile(x.numpy(), p, axis=-1), abs=1e-5)


def test_scale_and_zero_by_hand() -> None:
    # [1, 4] in 2 bits: s = 1, z = -1; [-1, 2]: s = 1, z = 1; a single value is its own step
    scale, zero = affine(torch.tensor([1.0, -1.0, 0.3, 0.0]), torch.tensor([4.0, 2.0, 0.3, 0.0]), 2)
    assert scale.tolist() == pytest.approx([1.0, 1.0, 0.3, 1.0])
    assert zero.tolist() == [-1.0, 1.0, -1.0, 0.0]
    x = torch.tensor([[1.2, 3.4, 9.0], [-0.6, 0.2, 5.0], [0.3, 0.3, 0.3], [0.0, 0.0, 0.0]])
    found = rounded(x, scale[:, None], zero[:, None], 2)
    assert found.tolist() == [[1.0, 3.0, 4.0], [-1.0, 0.0, 2.0], [pytest.approx(0.3)] * 3, [0.0, 0.0, 0.0]]


def test_the_quantiles_are_those_that_lose_least() -> None:
    x = draw(1, 20000)
    x[0, :3] = 60.0
    _, high = least_ends(x, 4)
    assert float(high) < 5
    losses = {}
    for p in (0.999, 0.9999, 0.99999):
        ends = torch.tensor([np.quantile(x[0].numpy(), 1 - p)]), torch.tensor([np.quantile(x[0].numpy(), p)])
        scale, zero = affine(ends[0].float(), ends[1].float(), 4)
        losses[float(ends[1])] = float((rounded(x, scale, zero, 4) - x).square().sum())
    assert float(high) == pytest.approx(min(losses, key=lambda k: losses[k]), rel=1e-5)


def test_a_range_a_channel_or_one_for_all() -> None:
    x = draw(500, 4) * torch.tensor([1.0, 10.0, 0.1, 1.0]) + torch.tensor([0.0, 5.0, 0.0, 0.0])
    one, many = (Percentile(6, per=per).fit(moments(x), 4, "a") for per in ("tensor", "channel"))  # type: ignore[arg-type]
    assert (one.scale.shape, many.scale.shape) == ((), (4,))
    loss = [(step(x) - x).square().mean(0) for step in (one, many)]
    assert (loss[1][2] < 1e-2 * loss[0][2]).all()
    read = from_written(written(chain([many])))
    assert read is not None
    read.load_state_dict(chain([many]).state_dict())  # type: ignore[union-attr]
    assert torch.equal(read(x), many(x))


def test_a_constant_channel_keeps_its_value() -> None:
    x = draw(300, 3)
    x[:, 1] = 0.37
    step = Percentile(4, per="channel").fit(moments(x), 3, "a")
    assert torch.allclose(step(x)[:, 1], x[:, 1])


# -- dual clipping


@pytest.mark.limit("repquant")
def test_learned_ends_lose_a_fifth_less_where_a_channel_has_outliers() -> None:
    """Card 029: 0.1 % of heavy outliers in one channel; the outputs of the layer behind lose at least 20 % less."""
    x, weight = draw(2000, 16), draw(24, 16, seed=1)
    x[:2, 5] = torch.tensor([15.0, -12.0])

    def loss(low: torch.Tensor, high: torch.Tensor) -> float:
        return float(((rounded(x, *affine(low, high, 4), 4) - x) @ weight.T).square().sum())

    low, high = x.amin(0), x.amax(0)
    ends = learned_ends(x, [weight], low, high, 4)
    assert loss(*ends) < 0.8 * loss(low, high)
    assert float(ends[1][5]) < 8
    assert all(bool((a >= b - 1e-5).all()) for a, b in ((ends[0], low), (high, ends[1])))


@pytest.mark.limit("repquant")
def test_without_steps_learned_ends_are_the_whole_range() -> None:
    x = draw(100, 4)
    low, high = learned_ends(x, [draw(3, 4, seed=1)], x.amin(0), x.amax(0), 4, steps=0)
    assert torch.equal(low, x.amin(0))
    assert torch.equal(high, x.amax(0))


def test_the_gradient_of_an_end_is_that_of_what_it_cuts_off() -> None:
    x = torch.tensor([[3.0], [-5.0], [0.2]])
    low, high = torch.tensor([-1.0], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    found = soft_rounded(x, low, high, 8)
    assert torch.allclose(found, rounded(x, *affine(low.detach(), high.detach(), 8), 8))
    (found * torch.tensor([[1.0], [10.0], [0.0]])).sum().backward()
    assert high.grad is not None
    assert low.grad is not None
    assert float(high.grad) == pytest.approx(1.0)  # 3 is cut off at the upper end, -5 at the lower
    assert float(low.grad) == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: Percentile(4, per="row"), "per is 'row'; expected tensor or channel"),  # type: ignore[arg-type]
        (lambda: Percentile(4, quantiles=()), "quantiles are"),
        (lambda: Percentile(40), "2 to 16"),
        (lambda: Percentile(4).fit(None, 4, "x.q"), "x.q met no calibration token"),
    ],
)
def test_mistakes_are_told(wrong: object, told: str) -> None:
    with pytest.raises(PosttrainError, match=told):
        wrong()  # type: ignore[operator]
