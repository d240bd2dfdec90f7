"""Reinforce-Ada: the card's checks, the paper's loss by autograd, and steps in the training loop."""

from __future__ import annotations

import math

import pytest
import torch
from guided_world import assert_equal_gradients, entropy, guided_world, loss_of, prepared, token_mean
from padded_world import World, float64  # noqa: F401 (a fixture)
from torch import Tensor

from posttrain import methods
from posttrain.objective.advantage import GroupNormalised
from posttrain.objective.batch import Batch
from posttrain.rollout.strategy import Plain
from posttrain.trajectory import Prompt
from tiny_runs import after, moved
from tiny_tasks import single_precision, step_context, tiny_policy, tiny_prompts

MEANS, SIZES = (0.0625, 0.5, 0.9, 0.25), (32.0, 8.0, 16.0, 8.0)


def pooled_world(seed: int) -> World:
    """A batch whose groups are selections of pools."""
    world = guided_world("policy", seed=seed)
    group = world.batch.group
    world.batch.facts = {"pool_mean": torch.tensor(MEANS)[group], "pool_size": torch.tensor(SIZES)[group]}
    return world


def paper(world: World, scale: bool, low: float, high: float, ceiling: float, bonus: float) -> Tensor:
    w = world.padded()
    advantage = torch.empty_like(w.reward)
    for rows, mean, size in zip(w.groups, MEANS, SIZES, strict=True):
        deviation = math.sqrt(mean * (1 - mean) * size / (size - 1)) + 1e-6
        advantage[rows] = (w.reward[rows] - mean) / (deviation if scale else 1)
    a = advantage[:, None]
    rho = (w.logp - w.old).exp()
    each = -torch.min(rho * a, rho.clamp(1 - low, 1 + high) * a)
    each = torch.where(a < 0, torch.min(each, -ceiling * a), each)
    return token_mean(w, each - bonus * entropy(world))


@pytest.mark.gradient("reinforce-ada")
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("scale", ["none", "pool"])
def test_is_the_papers_loss(seed: int, scale: str) -> None:
    method = methods.reinforce_ada(scale=scale, dual_clip=4.0, entropy=0.01)  # type: ignore[arg-type]
    world = pooled_world(seed)
    loss = loss_of(world, method, prepared(world, method))
    expected = paper(world, scale == "pool", 0.2, 0.28, 4.0, 0.01)
    torch.testing.assert_close(loss.value, expected.detach(), rtol=1e-9, atol=1e-9)
    assert_equal_gradients(world, loss.surrogate, expected)


@pytest.mark.gradient("reinforce-ada")
def test_its_defaults_are_the_papers() -> None:
    method, world = methods.reinforce_ada(), pooled_world(2)
    loss = loss_of(world, method, prepared(world, method))
    assert_equal_gradients(world, loss.surrogate, paper(world, False, 0.2, 0.28, 10.0, 1e-4))


@pytest.mark.limit("reinforce-ada")
def test_one_round_of_a_group_is_dr_grpos_advantage() -> None:
    # card 128 (a): N = 1, M = n; the same completions, in another order
    def vowel(completion: str, prompt: Prompt) -> float:
        return float(any(c in "aeiouAEIOU" for c in completion))

    method = methods.reinforce_ada("never", rounds=1, samples=6)
    with single_precision():
        ours, theirs = (
            s(tiny_prompts(6), step_context(tiny_policy(), vowel, group=6)) for s in (method.rollouts, Plain())
        )
        found, expected = Batch.of(ours), Batch.of(theirs)
        method.objective.prepare(found)
        GroupNormalised("none").prepare(expected)
    for g, (group, plain) in enumerate(zip(ours, theirs, strict=True)):
        assert {t.text for t in group.trajectories} == {t.text for t in plain.trajectories}
        credit = [
            {
                t.text: float(batch.advantage[batch.sequence == s][0])
                for s, t in zip((batch.group == g).nonzero()[:, 0].tolist(), members.trajectories, strict=True)
            }
            for batch, members in ((found, group), (expected, plain))
            if batch.advantage is not None
        ]
        assert credit[0] == pytest.approx(credit[1], abs=1e-7)
    assert 0 < expected.reward.mean() < 1


def test_trains_on_a_balanced_few() -> None:
    run = after(methods.reinforce_ada(), reward=lambda text, prompt: float("a" in text), steps=3)
    assert moved(run)
    first = run.metrics[0]
    assert 8 <= first["samples_per_prompt"] <= 32
    assert run.rollouts == round(sum(m["samples_per_prompt"] for m in run.metrics) * 3)
    assert {"unresolved", "one_sided_pools", "negative_entropy"} <= first.keys()


def test_a_step_without_any_success_changes_nothing() -> None:
    run = after(methods.reinforce_ada(entropy=0), reward=lambda text, prompt: 0.0)
    assert [m["grad_norm"] for m in run.metrics] == [0, 0]
    assert [m["unresolved"] for m in run.metrics] == [1, 1]
    assert not moved(run)
