"""The optimizer: equal to torch's AdamW in fp32, fp32 masters for bf16 models, clipping, schedules."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from posttrain.training.optim import MasterAdamW, learning_rate
from posttrain.training.settings import Settings
from posttrain.trajectory import PosttrainError

BASE = Settings(learning_rate=1e-2, weight_decay=0.1, betas=(0.9, 0.95), max_grad_norm=0.5)


def layer(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).to(dtype)


def loss_of(model: nn.Module, seed: int, rows: int = 8) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    x = torch.randn(rows, 5, generator=draw).to(dtype)
    return (model(x).float() ** 2).sum()


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_equals_torch_adamw_in_fp32(clip: float) -> None:
    ours, theirs = layer(), layer()
    chosen = replace(BASE, max_grad_norm=clip)
    optimizer = MasterAdamW(ours.named_parameters(), chosen)
    decay = [p for p in theirs.parameters() if p.ndim > 1]
    plain = [p for p in theirs.parameters() if p.ndim <= 1]
    reference = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], betas=chosen.betas, fused=True
    )
    for step in range(20):
        rate = learning_rate(chosen, step, 20)
        loss_of(ours, step).backward()
        norm = optimizer.step(rate)
        loss_of(theirs, step).backward()
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip or math.inf)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
        reference.zero_grad()
        assert norm == pytest.approx(float(expected), rel=1e-6)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert all(p.grad is None for p in ours.parameters())


def test_weight_decay_spares_vectors() -> None:
    model = layer()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = MasterAdamW(model.named_parameters(), replace(BASE, weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.1)
    for name, p in model.named_parameters():
        shrunk = before[name] * (1 - 0.1 * 0.5) if p.ndim > 1 else before[name]
        torch.testing.assert_close(p.detach(), shrunk)


def test_masters_keep_updates_that_bf16_loses() -> None:
    """An update of 1e-4 of the weight is below half the spacing of bf16 (2^-9 of it)."""
    lost, kept = (nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16)) for _ in range(2))
    alone = torch.optim.AdamW([lost], lr=1e-4, weight_decay=0.0)
    optimizer = MasterAdamW([("w", kept)], replace(BASE, weight_decay=0.0, max_grad_norm=0.0))
    for _ in range(100):
        lost.grad = torch.ones_like(lost)
        alone.step()
        kept.sum().backward()
        optimizer.step(1e-4)
    assert bool((lost == 1).all())
    torch.testing.assert_close(optimizer.masters[0].detach(), torch.full((4, 4), 0.99), rtol=1e-5, atol=0)
    assert bool((kept == torch.tensor(0.99).to(torch.bfloat16)).all())
    assert kept.dtype == torch.bfloat16


def test_gradients_of_micro_batches_are_added_in_fp32() -> None:
    """256 and eight times a quarter: a bf16 sum would stay at 256, whose neighbour is 258."""
    weight = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = MasterAdamW([("w", weight)], BASE)
    for size in [256.0, *([0.25] * 8)]:
        (weight * size).sum().backward()
        assert weight.grad is None
    (master,) = optimizer.masters
    assert master.grad is not None
    assert master.grad.tolist() == [258.0, 258.0]


def test_accumulation_equals_one_big_batch() -> None:
    whole, parts = layer(), layer()
    optimizers = [MasterAdamW(m.named_parameters(), BASE) for m in (whole, parts)]
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(12, 5, generator=draw)
    (whole(x) ** 2).sum().backward()
    for piece in x.split([5, 1, 6]):
        (parts(piece) ** 2).sum().backward()
    norms = [optimizer.step(1e-2) for optimizer in optimizers]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(dtype: torch.dtype, bad: float) -> None:
    model = layer(dtype)
    optimizer = MasterAdamW(model.named_parameters(), BASE)
    loss_of(model, 0).backward()
    optimizer.step(1e-2)
    before = {name: t.clone() for name, t in optimizer.tensors().items()}
    loss_of(model, 1).backward()
    for master in optimizer.masters:
        assert master.grad is not None
        master.grad.view(-1)[0] = bad
        break
    assert not math.isfinite(optimizer.step(1e-2))
    after = optimizer.tensors()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    loss_of(model, 2).backward()
    assert math.isfinite(optimizer.step(1e-2)), "the bad gradient must be gone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_restores_bit_for_bit(dtype: torch.dtype) -> None:
    first, second = layer(dtype), layer(dtype, seed=9)
    one = MasterAdamW(first.named_parameters(), BASE)
    for step in range(3):
        loss_of(first, step).backward()
        one.step(1e-2)
    two = MasterAdamW(second.named_parameters(), BASE)
    two.load_tensors({name: t.clone() for name, t in one.tensors().items()})
    for step in range(3, 6):
        for model, optimizer in ((first, one), (second, two)):
            loss_of(model, step).backward()
            optimizer.step(1e-2)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_of_another_model_is_refused() -> None:
    model = layer()
    optimizer = MasterAdamW(model.named_parameters(), BASE)
    saved = optimizer.tensors()
    with pytest.raises(PosttrainError, match=r"holds nothing for 0\.bias.*another model"):
        optimizer.load_tensors({name: t for name, t in saved.items() if name != "weight/0.bias"})
    with pytest.raises(PosttrainError, match=r"shape \[2\] for 0\.bias; expected \[7\]"):
        optimizer.load_tensors(saved | {"weight/0.bias": torch.zeros(2)})


def test_close_takes_the_hooks_off() -> None:
    model = layer(torch.bfloat16)
    MasterAdamW(model.named_parameters(), BASE).close()
    loss_of(model, 0).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_schedules_by_hand() -> None:
    """Ten steps, two of them warm-up: thirds of the rate, then the schedule from the full rate."""
    base = Settings(learning_rate=3.0, warmup=0.2)

    def rates(schedule: str) -> list[float]:
        chosen = replace(base, schedule=schedule)  # type: ignore[arg-type]
        return [learning_rate(chosen, step, 10) for step in range(10)]

    assert rates("constant") == pytest.approx([1, 2, *[3] * 8])
    assert rates("linear") == pytest.approx([1, 2, *[3 * (1 - k / 8) for k in range(8)]])
    assert rates("cosine") == pytest.approx([1, 2, *[1.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]])
    assert rates("cosine")[6] == pytest.approx(1.5)
    without = replace(base, warmup=0.0, schedule="linear")
    assert [learning_rate(without, step, 3) for step in range(3)] == pytest.approx([3, 2, 1])


@settings(deadline=None)
@given(
    total=st.integers(1, 400),
    warmup=st.floats(0, 1),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
)
def test_rates_rise_then_never_rise_again(total: int, warmup: float, schedule: str) -> None:
    chosen = Settings(learning_rate=1.0, warmup=warmup, schedule=schedule)  # type: ignore[arg-type]
    rates = [learning_rate(chosen, step, total) for step in range(total)]
    assert all(0 < rate <= 1 for rate in rates), "no step is wasted on a rate of zero"
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
