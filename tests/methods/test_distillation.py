"""KDRL and on-policy distillation against their losses, and in limits where they equal something."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mixed_world import MixedWorld, Paper, Seen, assert_same, assert_same_gradient, group_of, normalised, pooled
from padded_world import float64  # noqa: F401
from torch import Tensor

from posttrain import methods
from posttrain.objective.advantage import GroupNormalised
from posttrain.objective.aggregate import TokenMean
from posttrain.objective.likelihood import Likelihood
from posttrain.objective.schedule import at
from posttrain.objective.teacher import TeacherKL
from posttrain.reward.shapings.solved import Solved
from posttrain.trajectory import PosttrainError, Source

LAYOUT: list[list[tuple[Source, float]]] = [
    [("policy", 1.0), ("policy", 0.0), ("policy", 0.0)],
    [("policy", 0.0), ("policy", 0.0)],
    [("policy", 1.0), ("policy", 1.0), ("policy", 0.0), ("policy", 0.0)],
]


def kdrl(beta: float = 5e-3, estimator: str = "k2", where: str = "all") -> Paper:
    def paper(seen: list[Seen]) -> Tensor:
        each = []
        for s in seen:
            r = s.teacher - s.logp
            k = r**2 / 2 if estimator == "k2" else r.exp() - r - 1
            unsolved = all(m.reward == 0 for m in group_of(seen, s))
            counted = {"all": True, "failed": s.reward == 0, "unsolved": unsolved}[where]
            each.append(-s.ratio * normalised(s, seen, 1e-4) + beta * counted * k)
        return pooled(each)

    return paper


def kd_rkl(seen: list[Seen]) -> Tensor:
    return pooled([-(s.teacher - s.logp).detach() * s.logp for s in seen])


CASES: list[tuple[str, dict[str, object], Paper]] = [
    ("kdrl", {}, kdrl()),
    ("kdrl", {"beta": 0.3, "slope": 0.0}, kdrl(0.3)),
    ("kdrl", {"beta": 0.3, "slope": 0.0, "estimator": "k3"}, kdrl(0.3, "k3")),
    ("kdrl", {"beta": 0.3, "slope": 0.0, "where": "failed"}, kdrl(0.3, where="failed")),
    ("kdrl", {"beta": 0.3, "slope": 0.0, "where": "unsolved"}, kdrl(0.3, where="unsolved")),
    ("kd-rkl", {}, kd_rkl),
]


@pytest.mark.gradient("kdrl", "kd-rkl")
@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize(("name", "arguments", "paper"), CASES, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_loss_and_gradient_equal_the_papers(
    name: str, arguments: dict[str, object], paper: Paper, budget: int | None
) -> None:
    world = MixedWorld(LAYOUT, seed=0)
    assert_same(world.of_method(methods.find(name).function(**arguments), budget), world.of_paper(paper))


@pytest.mark.limit("kdrl")
def test_without_the_teacher_it_is_grpo_over_tokens_without_clipping() -> None:
    # card 023, check (a)
    world = MixedWorld(LAYOUT, seed=1)
    grpo = methods.grpo().replace(advantage=GroupNormalised(), masks=(), aggregate=TokenMean())
    assert_same(world.of_method(methods.kdrl(beta=0.0, slope=0.0)), world.of_method(grpo), 1e-12)


@pytest.mark.limit("kdrl", "kd-rkl")
def test_where_all_rewards_are_equal_it_is_on_policy_distillation() -> None:
    # card 023, check (a): the pull acts on groups without a signal, too
    world = MixedWorld([[("policy", 1.0)] * 3, [("policy", 0.0)] * 2], seed=2)
    _, found = world.of_method(methods.kdrl(beta=0.7, slope=0.0))
    _, wanted = world.of_method(methods.kd_rkl())
    assert_same_gradient(found, [0.7 * g for g in wanted], 1e-12)


@pytest.mark.limit("kdrl")
def test_a_teacher_that_is_the_policy_pulls_nowhere() -> None:
    # card 023, check (c)
    world = MixedWorld([[("policy", 1.0)] * 3], seed=3)
    world.batch.teacher_logp = world.policy.log_likelihood(world.batch).logp.detach()
    for method in (methods.kdrl(0.5, 0.0), methods.kdrl(0.5, 0.0, estimator="k3"), methods.kd_rkl()):
        value, gradient = world.of_method(method)
        assert float(value) == pytest.approx(0, abs=1e-12)
        assert all(float(g.abs().max()) < 1e-12 for g in gradient)


@pytest.mark.parametrize(("estimator", "forward"), [("k2", False), ("k3", True)])
def test_expected_gradients_over_a_vocabulary_are_those_of_the_divergences(estimator: str, forward: bool) -> None:
    # card 023, check (b): Σ_v π(v) ∇K_v, with the weights π(v) constant
    draw = torch.Generator().manual_seed(4)
    logits = torch.randn(5, generator=draw).requires_grad_()
    teacher = torch.randn(5, generator=draw).log_softmax(0)
    logp = logits.log_softmax(0)
    batch = replace(MixedWorld([[("policy", 1.0)]], seed=0).batch, teacher_logp=teacher)
    term = TeacherKL(1.0, estimator)(batch, Likelihood(logp))  # type: ignore[arg-type]
    (found,) = torch.autograd.grad((logp.exp().detach() * term).sum(), logits, retain_graph=True)
    kl = (teacher.exp() * (teacher - logp)) if forward else (logp.exp() * (logp - teacher))
    (wanted,) = torch.autograd.grad(kl.sum(), logits)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_beta_declines_to_its_floor() -> None:
    # card 023, check (d)
    (pull,) = methods.kdrl().objective.divergences  # type: ignore[union-attr]
    batch = MixedWorld(LAYOUT, seed=0).batch
    found = [at(pull.coefficient, replace(batch, step=s, total=280)) for s in (0, 40, 80, 279)]
    assert found == pytest.approx([5e-3, 3e-3, 1e-3, 1e-3])


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_an_impossible_token_pulls_as_one_at_the_bound(estimator: str) -> None:
    pull = TeacherKL(1.0, estimator, bound=10.0)  # type: ignore[arg-type]
    batch = MixedWorld([[("policy", 1.0)]], seed=0).batch

    def at_ratio(r: float) -> tuple[float, float]:
        logp = torch.zeros(1).requires_grad_()
        term = pull(replace(batch, teacher_logp=torch.tensor([r])), Likelihood(logp))
        (slope,) = torch.autograd.grad(term.sum(), logp)
        return float(term.detach()), float(slope)

    for sign in (-1, 1):
        value, slope = at_ratio(sign * 10.0)
        beyond, same = at_ratio(sign * 12.0)
        assert same == slope
        assert beyond - value == pytest.approx(-slope * sign * 2)
    figures = pull.figures(replace(batch, teacher_logp=torch.tensor([-30.0, -2.0])), Likelihood(torch.zeros(2)))
    assert figures["teacher_bound"].tolist() == [1, 0]
    assert figures["teacher_kl"].tolist() == [30, 2]
    credit = methods.kd_rkl().objective.advantage.credit(  # type: ignore[union-attr]
        replace(batch, teacher_logp=torch.tensor([-30.0, -2.0])), torch.zeros(2)
    )
    assert credit.advantage.tolist() == [-10, -2]


def test_the_log_says_how_often_the_bound_was_needed() -> None:
    world = MixedWorld(LAYOUT, seed=5)
    method = methods.kdrl(bound=0.3)
    batch = world.fresh()
    method.objective.prepare(batch)
    metrics = method.objective(batch, world.likelihood(batch, method), batch.totals).metrics
    bound, tokens = metrics["teacher_bound"]
    assert 0 < bound < tokens == batch.target.numel()
    assert "teacher_kl" in metrics


@pytest.mark.parametrize("arguments", [{"estimator": "k1"}, {"where": "wrong"}])
def test_unknown_choices_are_refused(arguments: dict[str, str]) -> None:
    with pytest.raises(PosttrainError, match="expected one of"):
        methods.kdrl(**arguments)  # type: ignore[arg-type]


def test_only_where_prompts_are_told_apart_are_successes_counted() -> None:
    assert methods.kdrl(where="unsolved", success=0.5).shaping == (Solved(0.5),)
    assert methods.kdrl(where="failed").shaping == ()
