"""DFT, ASFT and rejection sampling against their papers' losses, and in limits where they equal something."""

from __future__ import annotations

import math

import pytest
import torch
from flat_tokens import one_token
from mixed_world import MixedWorld, Paper, Seen, assert_same, assert_same_gradient, pooled
from padded_world import float64  # noqa: F401
from torch import Tensor

from posttrain import methods
from posttrain.objective.divergence import FullKL
from posttrain.trajectory import PosttrainError, Source

DEMONSTRATIONS: list[list[tuple[Source, float]]] = [[("expert", 1.0)]] * 5
SAMPLES: list[list[tuple[Source, float]]] = [
    [("policy", 1.0), ("policy", 0.0), ("policy", 0.5)],
    [("policy", 0.0), ("policy", 0.0)],
    [("policy", 1.0), ("policy", 1.0)],
]


def asft(anchor: float = 0.1, forward: bool = True, weighted: bool = True) -> Paper:
    def paper(seen: list[Seen]) -> Tensor:
        each = []
        for s in seen:
            first, second = (s.reference_log_p, s.log_p) if forward else (s.log_p, s.reference_log_p)
            kl = (first.exp() * (first - second)).sum(-1)
            weight = s.logp.exp().detach() if weighted else torch.ones(len(s))
            each.append(-weight * s.logp + anchor * kl)
        return pooled(each)

    return paper


def raft(success: float) -> Paper:
    return lambda seen: pooled([-s.logp for s in seen if s.reward >= success])


@pytest.mark.gradient("asft")
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize(
    ("arguments", "paper"),
    [
        ({}, asft()),
        ({"anchor": 0.7, "kl": "reverse"}, asft(0.7, forward=False)),
        ({"anchor": 0.7, "weighted": False}, asft(0.7, weighted=False)),
    ],
)
def test_asft_equals_the_papers_loss(arguments: dict[str, object], paper: Paper, budget: int | None, seed: int) -> None:
    world = MixedWorld(DEMONSTRATIONS, seed=seed)
    assert_same(world.of_method(methods.find("asft").function(**arguments), budget), world.of_paper(paper))


@pytest.mark.limit("asft", "dft")
def test_without_its_anchor_asft_is_dft() -> None:
    # card 051, check (b)
    world = MixedWorld(DEMONSTRATIONS, seed=2)
    assert_same(world.of_method(methods.asft(0.0)), world.of_method(methods.dft()), 1e-15)
    assert_same(world.of_method(methods.asft(0.0, weighted=False)), world.of_method(methods.sft()), 1e-15)


@pytest.mark.limit("asft", "dft")
@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_at_the_first_step_asft_is_dft(kl: str) -> None:
    # card 051, check (c): the KL is 0, and so is its gradient
    world = MixedWorld(DEMONSTRATIONS, seed=3)
    world.first = world.policy
    assert_same(world.of_method(methods.asft(0.5, kl)), world.of_method(methods.dft()), 1e-12)  # type: ignore[arg-type]


def test_one_token_of_probability_a_quarter() -> None:
    # card 051, check (a)
    value, gradient = one_token(methods.dft().objective, 0.25)
    assert value == pytest.approx(0.34657, abs=1e-5)
    assert gradient == pytest.approx(-0.1875, abs=1e-12)
    value, gradient = one_token(methods.sft().objective, 0.25)
    assert value == pytest.approx(math.log(4), abs=1e-12)
    assert gradient == pytest.approx(-0.75, abs=1e-12)


@pytest.mark.parametrize("name", ["sft", "dft"])
def test_certain_tokens_have_no_gradient(name: str) -> None:
    # card 051, check (b)
    _, gradient = one_token(methods.find(name).function().objective, 1 - 1e-12)
    assert gradient == pytest.approx(0, abs=1e-11)


@pytest.mark.gradient("dft")
def test_the_gradient_of_dft_is_that_of_the_mean_probability() -> None:
    # card 051, check (d)
    world = MixedWorld(DEMONSTRATIONS, seed=4)
    _, found = world.of_method(methods.dft())
    _, wanted = world.of_paper(lambda seen: pooled([-s.logp.exp() for s in seen]))
    assert_same_gradient(found, wanted)


def test_dft_is_the_tight_bound_on_the_reward() -> None:
    # card 051, check (e): Σ R π ≥ Σ R q (1 + log π/q) for any q; equal for q = π, with the gradient Σ R π ∇log π
    draw = torch.Generator().manual_seed(5)
    logits = torch.randn(6, generator=draw).requires_grad_()
    data = torch.randn(6, generator=draw).softmax(0)
    reward = torch.rand(6, generator=draw)
    policy = logits.softmax(0)

    def bound(q: Tensor) -> Tensor:
        return (reward * q * (1 + (policy / q).log())).sum()

    expected = (reward * policy).sum()
    assert bound(data) < expected
    torch.testing.assert_close(bound(policy.detach()), expected, rtol=1e-12, atol=1e-12)
    (found,) = torch.autograd.grad(bound(policy.detach()), logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_asft_asks_for_the_divergence_that_it_is_told() -> None:
    assert methods.asft(0.3, "reverse").objective.full_divergence == FullKL(0.3, "reverse")
    with pytest.raises(PosttrainError, match="expected forward or reverse"):
        methods.asft(kl="backward")  # type: ignore[arg-type]


@pytest.mark.gradient("raft")
@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("success", [1.0, 0.5])
def test_raft_equals_sft_on_what_was_right(success: float, budget: int | None) -> None:
    world = MixedWorld(SAMPLES, seed=6)
    assert_same(world.of_method(methods.raft(success), budget), world.of_paper(raft(success)))


@pytest.mark.limit("raft")
def test_raft_where_all_is_right_is_sft() -> None:
    world = MixedWorld([[("policy", 1.0)] * 3, [("policy", 1.0)]], seed=7)
    assert_same(world.of_method(methods.raft()), world.of_method(methods.sft()), 1e-12)


def test_raft_on_failures_changes_nothing() -> None:
    world = MixedWorld([[("policy", 0.0)] * 3], seed=8)
    value, gradient = world.of_method(methods.raft())
    assert float(value) == 0
    assert all(not bool(g.any()) for g in gradient)
