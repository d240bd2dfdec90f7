"""Straight-through rounding against its own graph in autograd, and what is held in half precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from posttrain.compress.activations.dynamic import Dynamic
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.packed.inputs import chain
from posttrain.compress.packed.linear import TransformedLinear
from posttrain.compress.solvers.learned import SoftLinear, fake_quantized, fitted, held, nearest, straight_through
from posttrain.compress.solvers.omniquant import ClippedRange


def rounded(v: Tensor) -> Tensor:
    return v + (v.round() - v).detach()


def floored(v: Tensor) -> Tensor:
    return v + (v.floor() - v).detach()


def by_hand(w: Tensor, s: Tensor, z: Tensor, top: int, *, float_zero: bool, clip_first: bool, delta: Tensor | None):
    """The graph of cards 000 and 126, in plain operations."""
    shape, w = w.shape, w.view(w.shape[0], s.shape[1], -1)
    s, z = s[..., None], z[..., None]
    v = (w - z) / s if float_zero else w / s
    if not float_zero:
        v = v + z
    if delta is not None:
        c = (floored(v) + delta.view(w.shape)).clamp(0, top)
    else:
        c = rounded(v.clamp(0, top)) if clip_first else rounded(v).clamp(0, top)
    return (s * c + z if float_zero else s * (c - z)).view(shape)


@pytest.mark.parametrize("float_zero", [False, True])
@pytest.mark.parametrize("kind", ["rounded", "clip first", "delta"])
def test_value_and_gradients_are_those_of_the_plain_graph(float_zero: bool, kind: str) -> None:
    torch.manual_seed(0)
    w = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    s = (0.2 + 0.3 * torch.rand(6, 2, dtype=torch.float64)).requires_grad_()
    z = torch.randn(6, 2, dtype=torch.float64) - 1 if float_zero else torch.randint(0, 4, (6, 2)).double()
    z.requires_grad_(float_zero)
    delta = torch.rand(6, 8, dtype=torch.float64, requires_grad=True) if kind == "delta" else None
    learned = [t for t in (w, s, z if float_zero else None, delta) if t is not None]
    options = {"float_zero": float_zero, "clip_first": kind == "clip first", "delta": delta}
    upstream = torch.randn(6, 8, dtype=torch.float64)
    found, wanted = fake_quantized(w, s, z, 3, **options), by_hand(w, s, z, 3, **options)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    for a, b in zip(
        torch.autograd.grad((found * upstream).sum(), learned),
        torch.autograd.grad((wanted * upstream).sum(), learned),
        strict=True,
    ):
        assert float(b.abs().max()) > 0
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_the_gradient_by_the_scale_is_rounded_minus_unrounded() -> None:
    """Card 000: at v = 0.3 s it is -0.3; Qn and Qp outside."""
    s = torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True)
    for v, wanted in ((0.3, -0.3), (1.6, 0.4), (-9.0, -4.0), (7.0, 3.0)):
        w = torch.tensor([[v * 0.5]], dtype=torch.float64)
        value = fake_quantized(w, s, torch.full_like(s, 4.0).detach(), 7, clip_first=True)
        assert torch.autograd.grad(value.sum(), s)[0].item() == pytest.approx(wanted)


def test_between_the_top_level_and_half_a_step_above_only_clipping_first_stops_the_gradient() -> None:
    w = torch.tensor([[3.3]], dtype=torch.float64, requires_grad=True)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for clip_first, wanted in ((True, 0.0), (False, 1.0)):
        value = fake_quantized(w, one, zero, 3, clip_first=clip_first)
        assert value.item() == 3.0
        assert torch.autograd.grad(value, w)[0].item() == wanted


def test_held_values_are_half_precision_with_a_gradient_of_one() -> None:
    x = torch.tensor([0.1, 1e-3, 123.4], requires_grad=True)
    y = held(x)
    assert torch.equal(y, x.half().float())
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones(3))


def test_straight_through_is_exact_in_low_precision() -> None:
    soft = torch.randn(100).bfloat16().requires_grad_()
    hard = torch.randn(100).bfloat16()
    assert torch.equal(straight_through(hard, soft), hard)


@pytest.mark.parametrize("zero", ["none", "integer", "float"])
def test_nearest_codes_are_those_of_the_grid(zero: str) -> None:
    torch.manual_seed(0)
    weight, grid = torch.randn(5, 32), Uniform(3, 8, zero)  # type: ignore[arg-type]
    scale, zeros = fitted(weight, grid, "w")
    wanted = torch.cat([grid.fit(g).nearest(g) for g in weight.split(8, 1)], 1)
    assert torch.equal(nearest(weight, scale, zeros, 7, zero == "float"), wanted)


def test_a_soft_layer_rounds_its_inputs_and_passes_their_gradient_on() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 3)
    step = Dynamic(4).fit(None, 8, "w")
    soft = ClippedRange(linear.weight.detach(), 8, 1, start=30.0)
    layer = SoftLinear(soft, TransformedLinear.of(linear, chain([Dynamic(8).fit(None, 8, "w")])), step)  # type: ignore[arg-type]
    x = torch.randn(2, 8, requires_grad=True)
    y = layer(x)
    met = step(layer.steps[0](x)).detach()
    torch.testing.assert_close(y, met @ soft().T + linear.bias)
    layer = SoftLinear(soft, linear, step)
    got = torch.autograd.grad(layer(x).sum(), x)[0]
    torch.testing.assert_close(got, soft().detach().sum(0).expand(2, -1))
