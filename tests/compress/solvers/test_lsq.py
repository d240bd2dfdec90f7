"""Learned steps: where they start, their gradient, what is stored."""

from __future__ import annotations

import pytest
import torch

from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.solvers.lsq import LearnedStep, LearnedSteps, initial_step
from posttrain.trajectory import PosttrainError
from tiny_blocks import GROUP, compressed, divergence, logits, text, tiny, weights

GRID = Uniform(3, GROUP, "none")


def test_the_first_step() -> None:
    weight = torch.tensor([[[1.0, -3.0, 2.0, 2.0]]])
    assert initial_step(weight, 3).item() == pytest.approx(2 * 2.0 / 3**0.5)
    assert initial_step(torch.zeros(1, 1, 4), 3).item() == 1.0


def test_the_gradient_of_a_step_is_slowed_by_the_root_of_n_times_the_highest_level() -> None:
    torch.manual_seed(0)
    weight = torch.randn(1, 16)
    made = LearnedStep(weight, 3, 1, step_rate=0.1)
    made().sum().backward()
    scale = made.start.half().float()
    v = weight / scale
    inside = (v >= -4) & (v <= 3)
    by_step = torch.where(inside, v.round() - v, v.clamp(-4, 3).round()).sum()
    assert made.factor.grad is not None
    assert made.factor.grad.item() == pytest.approx(float(by_step * made.start / (16 * 3) ** 0.5), rel=1e-3)


def test_what_is_packed_is_what_was_trained() -> None:
    torch.manual_seed(0)
    made = LearnedStep(torch.randn(6, 32), 3, 2, step_rate=0.1, rate=0.1)
    made.factor.data *= 1 + 0.2 * torch.randn_like(made.factor)
    made.weight.data += 0.1 * torch.randn_like(made.weight)
    assert torch.equal(made.pack().dequantize(), made().detach())


def test_weights_are_trained_where_they_are_to_be() -> None:
    weight = torch.randn(4, 16)
    assert len(LearnedStep(weight, 3, 1, step_rate=0.1).groups()) == 1
    still, moving = LearnedStep(weight, 3, 1, step_rate=0.1), LearnedStep(weight, 3, 1, step_rate=0.1, rate=0.5)
    assert not still.weight.requires_grad
    assert moving.groups()[1]["lr"] == pytest.approx(0.5 * float(weight.abs().mean()))


def test_training_loses_less_than_its_start() -> None:
    batches, one = text(4), {"num_hidden_layers": 1}
    truth = logits(tiny(**one), batches)

    def loss(epochs: int, rate: float) -> float:
        solver = LearnedSteps(GRID, epochs, schedule="cosine", step_rate=0.03, rate=rate)
        return divergence(compressed(tiny(**one), solver, batches), truth, batches)

    steps = loss(8, 0.0)
    assert steps < loss(0, 0.0)
    assert loss(8, 0.01) < steps


def test_no_training_is_rounding_on_the_first_steps() -> None:
    model = tiny()
    plain = {n: p.clone() for n, p in model.named_parameters()}
    for name, found in weights(compressed(model, LearnedSteps(GRID, 0))).items():
        by_group = plain[f"{name}.weight"].view(len(found), -1, GROUP)
        scale = initial_step(by_group, 3).half().float()[..., None]
        assert torch.equal(found, ((by_group / scale).round().clamp(-4, 3) * scale).view(found.shape))


def test_one_bit_is_refused() -> None:
    with pytest.raises(PosttrainError, match="2 to 8"):
        LearnedSteps(Uniform(1, GROUP, "none"))
