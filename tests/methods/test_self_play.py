"""eva: its solvers' losses against the papers', its limits, and prompts that evolve in the real loop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from padded_world import World
from torch import Tensor

from posttrain import methods
from posttrain.methods import Method
from posttrain.rollout.evolvers import RuleEvolver, Variation
from posttrain.rollout.strategies.evolve import Evolving
from posttrain.rollout.strategies.pairs import BestAgainstWorst
from posttrain.rollout.strategy import Plain
from posttrain.trajectory import PosttrainError, Prompt
from resumable import run, small, stopped_and_resumed, trainer
from tiny_tasks import tiny_policy, tiny_task


@pytest.fixture
def exact() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def dpo(w) -> Tensor:  # type: ignore[no-untyped-def]
    chosen, rejected = w.pairs(w.sum(w.logp - w.reference))
    return -F.logsigmoid(0.05 * (chosen - rejected)).mean()


def simpo(w) -> Tensor:  # type: ignore[no-untyped-def]
    chosen, rejected = w.pairs(w.mean(w.logp))
    return -F.logsigmoid(2 * (chosen - rejected) - 0.5).mean()


def orpo(w) -> Tensor:  # type: ignore[no-untyped-def]
    chosen, rejected = w.pairs(w.mean(w.logp))
    odds = chosen.exp() / (1 - chosen.exp()) / (rejected.exp() / (1 - rejected.exp()))
    return (-chosen - 0.1 * F.logsigmoid(odds.log())).mean()


def rloo(w) -> Tensor:  # type: ignore[no-untyped-def]
    ratio, losses = w.sum(w.logp - w.old).exp(), []
    for rows in w.groups:
        for i in rows:
            others = [float(w.reward[j]) for j in rows if j != i]
            advantage = w.reward[i] - sum(others) / len(others)
            losses.append(-torch.min(ratio[i] * advantage, ratio[i].clamp(0.8, 1.2) * advantage))
    return torch.stack(losses).mean()


@pytest.mark.usefixtures("exact")
@pytest.mark.gradient("eva")
@pytest.mark.parametrize(("solver", "paper"), [("dpo", dpo), ("simpo", simpo), ("orpo", orpo), ("rloo", rloo)])
def test_the_solvers_loss_is_the_papers(solver, paper) -> None:  # type: ignore[no-untyped-def]
    method = methods.eva(solver=solver)
    world = World("prompts" if solver == "rloo" else "preferences", 1)
    value = paper(world.padded())
    batch = world.fresh()
    method.objective.prepare(batch)
    loss = method.objective(batch, world.policy.log_likelihood(batch), batch.totals)
    torch.testing.assert_close(loss.value, value.detach(), rtol=1e-9, atol=1e-9)
    parameters = list(world.policy.parameters.values())
    found, wanted = (
        torch.autograd.grad(each, parameters, allow_unused=True, materialize_grads=True)
        for each in (loss.surrogate, value)
    )
    assert max(float(g.abs().max()) for g in wanted) > 1e-6
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# -- in the real loop ------------------------------------------------------------------------------------------------


def grown(prompt: Prompt, chance: np.random.Generator) -> Variation:
    return Variation(prompt.question.strip() + str(chance.integers(100)), answer="?")


EVOLVER = RuleEvolver(grown)


def eva(**options: object) -> Method:
    return small(methods.eva(**{"evolver": EVOLVER, "mixing": 0.0, "autonomous": 0.5, **options}))  # type: ignore[arg-type]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.limit("eva", "rloo")
def test_without_evolved_prompts_it_is_its_solver() -> None:
    plain = small(methods.rloo(), temperature=0.7)
    assert same(run(eva(solver="rloo", share=0.0), tiny_task(), tiny_policy), run(plain, tiny_task(), tiny_policy))


@pytest.mark.limit("eva")
def test_constant_information_is_uniform_evolution() -> None:  # card 021 (a)
    def every_gap_is_one(completion: str, prompt: Prompt) -> float:
        every_gap_is_one.calls += 1  # type: ignore[attr-defined]
        return float(every_gap_is_one.calls % 2)  # type: ignore[attr-defined]

    found = []
    for measure in ("gap", "uniform"):
        every_gap_is_one.calls = 0  # type: ignore[attr-defined]
        found.append(run(eva(solver="rloo", informativeness=measure), tiny_task(reward=every_gap_is_one), tiny_policy))
    assert same(*found)


def test_prompts_evolve_and_the_reference_is_renewed() -> None:
    policy = tiny_policy()
    made = trainer(eva(iteration=3), tiny_task(12), policy)
    rows: list[dict[str, float]] = []
    made.tracker.step = lambda step, seconds, metrics, groups: rows.append(metrics)  # type: ignore[method-assign]
    copies = []
    step = made.step

    def watched(collected):  # type: ignore[no-untyped-def]
        metrics = step(collected)
        assert made.reference is not None
        assert made.reference.copy is not None
        theirs = dict(policy.model.named_parameters())
        copies.append(all(torch.equal(p, theirs[n]) for n, p in made.reference.copy.model.named_parameters()))
        return metrics

    made.step = watched  # type: ignore[method-assign]
    made.run()
    assert copies == [False, False, True, False]
    assert [row["evolved"] for row in rows] == pytest.approx([0, 1 / 3, 2 / 3, 2 / 3])
    assert rows[-1]["generation"] > 0.3
    assert rows[-1]["loss"] > 0


@pytest.mark.parametrize("solver", ["dpo", "rloo"])
def test_a_stopped_eva_goes_on_as_if_nothing_had_been(solver: str, tmp_path: Path) -> None:
    method = eva(solver=solver, iteration=1)
    whole = run(method, tiny_task(), tiny_policy)
    assert same(stopped_and_resumed(method, tiny_task(), tiny_policy, tmp_path), whole)


def test_a_step_without_a_winner_changes_nothing() -> None:
    policy, before = tiny_policy(), tiny_policy()
    method = eva().with_settings(steps=1)
    trainer(method, tiny_task(reward=lambda completion, prompt: 1.0), policy).run()
    theirs = dict(before.model.named_parameters())
    assert all(torch.equal(p, theirs[n]) for n, p in policy.model.named_parameters())


def test_online_dpo_needs_no_evolution() -> None:
    method = small(methods.dpo()).replace(data="prompts", rollouts=BestAgainstWorst(Plain()))
    result = trainer(method, tiny_task(), tiny_policy())
    result.run()
    assert result.progress.rollouts == 4 * 3 * 4


def test_what_it_is_made_of() -> None:
    made = methods.eva()
    assert isinstance(made.rollouts, BestAgainstWorst)
    assert made.reference_every == 25
    assert methods.eva(solver="simpo").reference_every is None
    assert (made.settings.group, made.settings.temperature) == (6, 0.7)
    assert isinstance(methods.eva(solver="rloo", share=0.3).rollouts, Evolving)
    with pytest.raises(PosttrainError, match="'ppo'; expected dpo, simpo, orpo or rloo"):
        methods.eva(solver="ppo")  # type: ignore[arg-type]
