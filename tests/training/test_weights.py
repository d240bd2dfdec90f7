"""GraNet in the real loop: gradual magnitude pruning where nothing regrows, RigL where sparsity stays."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from posttrain import methods
from posttrain.models.adapters import add_lora
from posttrain.training.loop import Trainer
from posttrain.training.weights import CubicSparsity, KeepZeros, PruneAndRegrow, erk, pruned, random_mask, regrown
from posttrain.trajectory import PosttrainError
from tiny_training import demonstrations, make_policy, offline

pytestmark = pytest.mark.limit("granet")
STEPS = {"steps": 8, "batch": 4, "learning_rate": 1e-2}


def trainer(method: Any = None, dtype: torch.dtype = torch.float32, **options: Any) -> Trainer:
    made = method if method is not None else methods.granet(0.5, every=2)
    return offline(made.with_settings(**STEPS), demonstrations(), make_policy(dtype=dtype), **options)


def weights_of(run: Trainer) -> dict[str, Tensor]:
    named = dict(zip(run.optimizer.names, run.optimizer.masters, strict=True))
    return {name: named[name].detach() for name in pruned(run.policy)}


def rule(run: Trainer) -> PruneAndRegrow:
    assert isinstance(run.weights, PruneAndRegrow)
    return run.weights


def mask(run: Trainer, kept: dict[str, Tensor]) -> None:
    """Zero weights and moments by hand."""
    named = dict(zip(run.optimizer.names, run.optimizer.masters, strict=True))
    with torch.no_grad():
        for name, part in kept.items():
            named[name] *= part
            for key in ("exp_avg", "exp_avg_sq"):
                run.optimizer.adam.state[named[name]][key] *= part


def test_without_regrowth_it_is_gradual_magnitude_pruning_step_for_step() -> None:
    """(a), against plain SFT whose weights are pruned here by the cubic schedule."""
    run, plain = trainer(methods.granet(0.5, every=2, regrow=0.0)), trainer(methods.sft())
    kept = {name: torch.ones_like(w) for name, w in weights_of(plain).items()}
    count = sum(w.numel() for w in kept.values())
    for step in range(1, 9):
        run.advance()
        plain.advance()
        mask(plain, kept)
        if step in (2, 4):  # t_0 = 2, and half of 8 steps: one event between s_i and s_f
            sparsity = 0.5 - 0.5 * (1 - (step - 2) / 2) ** 3
            sizes = torch.cat([w.abs().flatten() for w in weights_of(plain).values()])
            threshold = sizes.sort().values[round(sparsity * count) - 1] if sparsity else -1.0
            kept = {name: (w.abs() > threshold).float() for name, w in weights_of(plain).items()}
            mask(plain, kept)
        for name, weight in weights_of(plain).items():
            assert torch.equal(weights_of(run)[name], weight), (step, name)
    assert rule(run).metrics()["sparsity"] == pytest.approx(0.5, abs=1e-4)


def test_with_a_sparsity_that_stays_it_is_rigl() -> None:
    """(b), against the drop and growth of each layer by the card's thresholds, on the loop's own gradients."""
    run = trainer(methods.granet(0.6, initial=0.6, every=2))
    before = {name: m.clone() for name, m in rule(run).masks.items()}
    counts = {name: int(m.sum()) for name, m in before.items()}
    seen: dict[str, Tensor] = {}
    step, optimizer = run.optimizer.step, run.optimizer

    def watched(rate: float) -> float:
        seen.update(optimizer.gradients())
        return step(rate)

    run.optimizer.step = watched  # type: ignore[method-assign]
    run.advance()
    assert all(torch.equal(rule(run).masks[n], m) for n, m in before.items())  # no event yet
    done = rule(run).updated
    grown: dict[str, Tensor] = {}

    def event(optimizer: Any, gradients: Any) -> None:
        for name, weight in weights_of(run).items():
            weight = weight * before[name]
            share = 0.005 + 0.495 * (1 + math.cos(math.pi * 2 / 8)) / 2
            count = math.ceil(share * counts[name])
            threshold = weight.abs().flatten().sort().values[int((~before[name]).sum()) + count - 1]
            left = weight.abs() > threshold
            gone = counts[name] - int(left.sum())
            scores = gradients[name].abs().masked_fill(left, -1.0).flatten()
            left.view(-1)[scores.topk(gone).indices] = True
            grown[name] = left
        done(optimizer, gradients)

    rule(run).updated = event  # type: ignore[method-assign]
    run.advance()
    assert {n: int(m.sum()) for n, m in rule(run).masks.items()} == counts
    assert all(torch.equal(rule(run).masks[n], m) for n, m in grown.items())
    assert any(not torch.equal(before[n], m) for n, m in grown.items())


@pytest.mark.parametrize("share", [0.0, 0.005, 0.3, 0.99])
@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
def test_as_many_come_back_as_go(share: float, density: float) -> None:
    """(c)"""
    draw = torch.Generator().manual_seed(0)
    mask = random_mask((20, 30), density, draw)
    weight, gradient = torch.randn(2, 20, 30, generator=draw)
    assert int(regrown(weight * mask, mask, gradient, share).sum()) == int(mask.sum()) == round(600 * density)


def test_drop_and_growth_by_hand() -> None:
    weight = torch.tensor([[3.0, -1.0, 2.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, False, False, False]])
    gradient = torch.tensor([[9.0, 0.5, 0.0, 1.0, -4.0, 2.0]])
    assert regrown(weight, mask, gradient, 0.3).tolist() == [[True, False, True, False, True, False]]
    # what was dropped may come back at once
    gradient[0, 1] = 7.0
    assert regrown(weight, mask, gradient, 0.3).tolist() == mask.tolist()


def test_sparsity_starts_and_ends_as_asked() -> None:
    """(d)"""
    schedule = CubicSparsity(0.9, 0.3, 10, 0.1, 0.8)
    assert (schedule.first(200), schedule.last(200)) == (20, 160)
    assert [schedule.at(t, 200) for t in (0, 20, 160, 200)] == pytest.approx([0.3, 0.3, 0.9, 0.9])
    assert schedule.at(90, 200) == pytest.approx(0.9 - 0.6 / 8)  # half of the way
    rates = [schedule.at(t, 200) for t in range(200)]
    assert rates == sorted(rates)


@pytest.mark.parametrize("density", [0.05, 0.5, 0.95, 1.0])
def test_initial_masks_make_up_the_density(density: float) -> None:
    """(d), with small layers that would exceed 1 kept whole."""
    shapes = [(8, 8), (64, 64), (256, 64), (64, 256)]
    found = erk(shapes, density)
    sizes = [a * b for a, b in shapes]
    assert sum(d * s for d, s in zip(found, sizes, strict=True)) == pytest.approx(density * sum(sizes))
    assert all(0 <= d <= 1 for d in found)
    if density == 0.05:
        assert found[2] / found[1] == pytest.approx((320 / 16384) / (128 / 4096))
    run = trainer(methods.granet(0.95, initial=1 - density, every=2))
    assert 1 - rule(run).metrics()["sparsity"] == pytest.approx(density, abs=0.01)
    assert all((w[~rule(run).masks[n]] == 0).all() for n, w in weights_of(run).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_gone_stays_zero_in_weights_and_moments(dtype: torch.dtype) -> None:
    run = trainer(methods.granet(0.7, every=2), dtype)
    for step in range(8):
        run.advance()
        modules = dict(run.policy.model.named_parameters())
        for name, master in zip(run.optimizer.names, run.optimizer.masters, strict=True):
            if name in rule(run).masks:
                gone = ~rule(run).masks[name]
                assert (master[gone] == 0).all()
                assert (modules[name][gone] == 0).all()
                assert (run.optimizer.adam.state[master]["exp_avg"][gone] == 0).all()
        assert rule(run).settled == (step >= 3)
    assert run.advance()["sparsity"] == pytest.approx(0.7, abs=1e-3)
    embedding = run.policy.base.get_input_embeddings().weight
    assert isinstance(run.policy.base.get_output_embeddings(), nn.Linear)
    assert (embedding != 0).float().mean() > 0.99


def test_a_run_that_was_interrupted_goes_on_as_if_it_was_not(tmp_path: Path) -> None:
    whole = trainer(methods.granet(0.6, initial=0.2, every=2))
    whole.run()
    first = trainer(methods.granet(0.6, initial=0.2, every=2), folder=tmp_path)
    first.stop = lambda: first.progress.step >= 3
    assert first.run().status == "interrupted"
    second = trainer(methods.granet(0.6, initial=0.2, every=2), folder=tmp_path)
    second.run()
    assert rule(second).done == rule(whole).done == 8
    assert all(torch.equal(rule(second).masks[n], m) for n, m in rule(whole).masks.items())
    assert all(torch.equal(weights_of(second)[n], w) for n, w in weights_of(whole).items())


def test_parts_are_those_of_the_run_alone() -> None:
    method = methods.granet(0.5, every=2)
    first, second = trainer(method), trainer(method)
    first.advance()
    assert (rule(first).done, rule(second).done) == (1, 0)
    assert method.weight_rule == PruneAndRegrow(CubicSparsity(0.5, 0.0, 2, 0.0, 0.5), 0.5)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sparsity": 1.0}, r"^sparsity goes from 0\.0 to 1\.0; expected shares"),
        ({"sparsity": 0.2, "initial": 0.4}, r"^sparsity goes from 0\.4 to 0\.2"),
        ({"every": 0}, r"^every is 0, start 0\.0 and end 0\.5; expected at least 1 step"),
        ({"start": 0.6}, r"^every is 10, start 0\.6 and end 0\.5"),
        ({"regrow": 1.0}, r"^regrow is 1\.0; expected a share"),
    ],
)
def test_mistakes_are_told(options: dict[str, Any], told: str) -> None:
    with pytest.raises(PosttrainError, match=told):
        methods.granet(**options)


def test_a_short_stage_is_pruned_at_its_end() -> None:
    for start, end in ((0.0, 0.5), (1.0, 1.0)):
        schedule = CubicSparsity(start=start, end=end)
        assert (schedule.first(8), schedule.last(8)) == (8, 8)
    run = trainer(methods.granet())
    assert [round(run.advance()["sparsity"], 3) for _ in range(8)] == [0.0] * 7 + [0.8]


def test_zeros_are_kept() -> None:
    method = methods.sft().replace(weight_rule=KeepZeros()).with_settings(**STEPS)
    policy = make_policy()
    weights = [policy.model.get_submodule(n.removesuffix(".weight")).weight for n in pruned(policy)]
    with torch.no_grad():
        for weight in weights[:4]:
            weight.mul_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5)
    before = [w.detach().clone() for w in weights]
    run = offline(method, demonstrations(), policy)
    assert 0 < run.advance()["sparsity"] < 0.5
    run.advance()
    for weight, was in zip(weights, before, strict=True):
        assert (weight[was == 0] == 0).all()
        assert (weight != was).any()


def test_adapters() -> None:
    policy = add_lora(make_policy(), rank=2)
    with pytest.raises(PosttrainError, match=r"^weights are pruned as they are trained, which an adapter keeps apart"):
        offline(methods.granet(every=2).with_settings(**STEPS), demonstrations(), policy)
