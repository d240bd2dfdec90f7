"""L4Q: five gradients against autograd, and what comes out is what was trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.compress.solvers.fisher import next_token_losses
from posttrain.compress.solvers.l4q import MergedAdapter, MergedFineTuning, _MergedProduct, first_levels
from posttrain.trajectory import PosttrainError
from tiny_blocks import GROUP, compressed, packed, text, tiny, walk, weights

GRID = Uniform(3, GROUP, "float")


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_gradients_are_those_of_the_plain_graph(bits: int) -> None:
    """Card 126: ∂x, ∂A, ∂B, ∂s, ∂b of s q + b in float64."""
    torch.manual_seed(0)
    rows, columns, rank, gamma = 5, 12, 2, 1.7
    lowest, top = -(2 ** (bits - 1)), 2**bits - 1
    w0, x = torch.randn(rows, columns).double(), torch.randn(4, columns).double().requires_grad_()
    a, b = torch.randn(rank, columns).double().requires_grad_(), torch.randn(rows, rank).double().requires_grad_()
    s = (0.3 + torch.rand(rows, 3)).double().requires_grad_()
    offset = (0.2 * torch.randn(rows, 3)).double().requires_grad_()
    upstream = torch.randn(4, rows).double()

    merged = (w0 + gamma * b @ a).view(rows, 3, 4)
    v = ((merged - offset[..., None]) / s[..., None]).clamp(lowest, lowest + top)
    q = v + (v.round() - v).detach()
    wanted = x @ (s[..., None] * q + offset[..., None]).view(rows, columns).T
    found = _MergedProduct.apply(x, w0, a, b, s, offset + lowest * s, gamma, top)
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)
    learned = (x, a, b, s, offset)
    grads = [torch.autograd.grad((y * upstream).sum(), learned) for y in (found, wanted)]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    if bits == 2:  # some weights are clipped, so the offset has a gradient; inside it has none
        assert float(grads[0][4].abs().max()) > 0


def test_the_gradient_of_the_step_by_hand() -> None:
    """One weight a group: inside q - v, below Qn, above Qp; and of the offset 0 inside, 1 outside."""
    w = torch.tensor([[0.3, -9.0, 9.0]]).double()
    s, low = torch.ones(1, 3).double().requires_grad_(), torch.zeros(1, 3).double().requires_grad_()
    nothing = torch.zeros(0, 3).double(), torch.zeros(1, 0).double()
    y = _MergedProduct.apply(torch.eye(3).double(), w, *nothing, s, low - 4 * s, 1.0, 7)
    by_step, by_offset = torch.autograd.grad(y.sum(), (s, low))
    torch.testing.assert_close(by_step, torch.tensor([[-0.3, -4.0, 3.0]]).double())
    torch.testing.assert_close(by_offset, torch.tensor([[0.0, 1.0, 1.0]]).double())


def made(weight: torch.Tensor, bits: int = 3, groups: int = 2, **options: Any) -> MergedAdapter:
    arguments = {
        "rank": 2, "alpha": 4.0, "rate": 0.1, "step_rate": 0.1, "offset": True, "start": "cover", **options
    }  # fmt: skip
    return MergedAdapter(weight, bits, groups, draw=torch.Generator().manual_seed(0), **arguments)


def test_with_many_bits_it_is_a_plain_adapter() -> None:
    torch.manual_seed(0)
    soft, x = made(torch.randn(6, 32), bits=8), torch.randn(3, 32, requires_grad=True)
    torch.nn.init.normal_(soft.up, std=1e-3)
    soft.factor.data.fill_(1.1)  # so that no weight is clipped
    plain = x @ (soft.weight + soft.gamma * soft.up @ soft.down).T
    torch.testing.assert_close(soft.product(x), plain, atol=0.15, rtol=0)
    one, other = (torch.autograd.grad(y.sum(), (soft.up, soft.down)) for y in (soft.product(x), plain))
    for a, b in zip(one, other, strict=True):  # no weight is clipped: the mask is 1
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("offset", [True, False])
def test_what_is_packed_is_what_was_trained_bit_for_bit(offset: bool) -> None:
    torch.manual_seed(0)
    soft = made(torch.randn(6, 32), offset=offset)
    for parameter in (soft.up, soft.factor, soft.shift):
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    found = soft.pack()
    assert isinstance(found, UniformWeight)
    assert found.kind == ("float" if offset else "none")
    torch.testing.assert_close(found.dequantize(), soft().detach(), atol=1e-6, rtol=0)
    eye = torch.eye(32)
    torch.testing.assert_close(soft.product(eye).T.detach(), found.dequantize(), atol=1e-6, rtol=0)


def test_first_levels_by_hand() -> None:
    weight = torch.tensor([[[-2.0, 0.0, 3.0, 1.0]]])
    assert [t.item() for t in first_levels(weight, 3, "cover")] == [1.0, 0.0]  # 3/3 against 2/4
    scale, offset = first_levels(weight, 3, "range")
    assert scale.item() == pytest.approx(5 / 7)
    assert offset.item() == pytest.approx(-2 + 4 * 5 / 7)
    mean, spread = weight.mean(), weight.std(unbiased=False)
    assert first_levels(weight, 3, "lsq+")[0].item() == pytest.approx(float(mean + 3 * spread) / 4)
    assert first_levels(torch.zeros(1, 1, 4), 3, "cover")[0].item() == 1.0


@pytest.mark.parametrize("rank", [0, 3])
def test_without_training_it_rounds_the_float_weights_on_the_first_levels(rank: int) -> None:
    model = tiny()
    plain = {n: p.clone() for n, p in model.named_parameters() if "_proj" in n}
    found = weights(compressed(model, MergedFineTuning(GRID, rank, epochs=0)))
    for name, weight in found.items():
        w = plain[f"{name}.weight"].view(len(weight), -1, GROUP)
        scale = first_levels(w, 3, "cover")[0].half().float()[..., None]
        wanted = (w / scale).round().clamp(-4, 3) * scale
        assert float((weight - wanted.view(weight.shape)).abs().max()) < 2e-3  # the lowest level in half precision


def test_training_lowers_the_loss_of_what_is_stored() -> None:
    batches = text(2)

    def loss(**options: Any) -> float:
        model = compressed(tiny(), MergedFineTuning(GRID, rows=4, **options), batches)
        with torch.no_grad():
            return float(torch.cat([next_token_losses(model, b) for b in batches]).mean())

    start = loss(epochs=0)
    steps = loss(epochs=10, rank=0, step_rate=0.02)
    both = loss(epochs=10, rank=4, rate=0.02, step_rate=0.02)
    assert steps < start
    assert both < steps


def test_the_deployed_loss_is_that_of_training() -> None:
    """Card 126: no gap. The last training forward pass and the packed model agree."""
    model, batches = tiny(), text(1)
    solver = MergedFineTuning(GRID, epochs=0)
    blocks = walk(model, batches)
    softened = []
    for block in blocks:
        from posttrain.compress.solvers.reconstruct import Opened

        opened = Opened(block, {})
        opened.put(solver._layers(block))
        softened.append(opened)
    for opened in softened:
        for layer in opened.layers.values():
            torch.nn.init.normal_(layer.soft.up, std=0.05)  # type: ignore[arg-type]
    with torch.no_grad():
        before = next_token_losses(model, batches[0])
        for opened in softened:
            opened.close()
        after = next_token_losses(model, batches[0])
    torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-5)
    assert F.l1_loss(before, torch.zeros_like(before)) > 0


def test_only_adapters_and_steps_are_trained_and_none_stays() -> None:
    model = tiny()
    kept = {n: p.clone() for n, p in model.named_parameters() if "_proj" not in n}
    compressed(model, MergedFineTuning(GRID, epochs=1, rows=2))
    now = dict(model.named_parameters())
    assert now.keys() == kept.keys()
    assert all(torch.equal(now[n], kept[n]) for n in kept)
    assert all(isinstance(layer.weight, UniformWeight) for layer in packed(model).values())


def test_errors() -> None:
    with pytest.raises(PosttrainError, match="whole model"):
        MergedFineTuning(GRID).solve_block(next(iter(walk(tiny()))))
    with pytest.raises(PosttrainError, match="start"):
        MergedFineTuning(GRID, start="range", offset=False)
    with pytest.raises(PosttrainError, match="2 to 8"):
        MergedFineTuning(Uniform(1, GROUP, "float"))
