"""Prefix-RFT and ThinkTuning: their cards' checks, their papers' losses by autograd, and steps in the training loop."""

from __future__ import annotations

import pytest
import torch
from guided_world import (
    assert_equal_gradients,
    centred,
    entropy,
    guided_world,
    loss_of,
    pad,
    prepared,
    token_mean,
    written_by,
)
from padded_world import World, float64  # noqa: F401 (a fixture)
from torch import Tensor

from posttrain import methods
from posttrain.objective.advantage import Demonstration
from posttrain.objective.aggregate import TokenMean
from posttrain.rollout.strategies.feedback import Feedback, Prompted
from tiny_runs import after, moved, same_weights
from tiny_tasks import tiny_policy

# -- Prefix-RFT ------------------------------------------------------------------------------------------------------


def prefix_loss(world: World, keep: float, length: int, bonus: float) -> Tensor:
    """The paper's: dual-clip PPO, prefix tokens below the entropy quantile without advantage, a constant length."""
    w = world.padded()
    theirs = written_by(world, "expert")
    advantage = centred(w).expand_as(w.logp).clone()
    places = theirs.nonzero()
    entropies = pad(world, world.batch.extras["old_entropy"])[theirs]
    for i in entropies.argsort()[: int((1 - keep) * len(entropies) + 1e-9)].tolist():
        advantage[tuple(places[i])] = 0
    rho = (w.logp - w.old).exp()
    each = torch.max(-rho * advantage, -rho.clamp(0.8, 1.2) * advantage)
    each = torch.where(advantage < 0, torch.min(each, -3 * advantage), each)
    return (w.mask * (each - bonus * entropy(world))).sum() / (length * len(w.reward))


@pytest.mark.gradient("prefix-rft")
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("keep", "bonus"), [(0.2, 0.001), (1.0, 0.0), (0.5, 0.3)])
def test_prefix_rft_is_the_papers_loss(seed: int, keep: float, bonus: float) -> None:
    method = methods.prefix_rft(keep=keep, entropy=bonus, length=40)
    world = guided_world("expert", seed=seed)
    loss = loss_of(world, method, prepared(world, method))
    expected = prefix_loss(world, keep, 40, bonus)
    torch.testing.assert_close(loss.value, expected.detach(), rtol=1e-9, atol=1e-9)
    assert_equal_gradients(world, loss.surrogate, expected)
    w = world.padded()
    assert bool(((w.logp - w.old).exp() > 3)[centred(w).expand_as(w.old) < 0].any())  # the dual clip bites


@pytest.mark.limit("prefix-rft")
def test_without_a_prefix_it_is_dr_grpo() -> None:
    # card 035 (a), on the same rollouts
    world = World("prompts", 3)
    world.batch.old_logp = None
    world.batch.extras["old_entropy"] = torch.rand(world.batch.target.numel())
    ours, theirs = methods.prefix_rft(entropy=0, length=64), methods.dr_grpo(length=64)
    losses = [loss_of(world, m, prepared(world, m)) for m in (ours, theirs)]
    assert torch.equal(losses[0].value, losses[1].value)
    assert torch.equal(losses[0].surrogate, losses[1].surrogate)
    assert_equal_gradients(world, losses[0].surrogate, losses[1].surrogate)


@pytest.mark.limit("prefix-rft")
def test_a_whole_demonstration_with_advantage_one_is_sft() -> None:
    # card 035 (b)
    world = World("demonstrations", 0, length=7)
    w = world.padded()
    world.batch.old_logp = None
    method = methods.prefix_rft(keep=1, entropy=0, length=50).replace(advantage=Demonstration())
    loss = loss_of(world, method, prepared(world, method))
    sequences = len(w.reward)
    assert_equal_gradients(world, loss.surrogate, -(w.logp * w.mask).sum() / (50 * sequences))
    sft = methods.sft()
    imitation = loss_of(world, sft, prepared(world, sft))
    assert_equal_gradients(world, loss.surrogate, imitation.surrogate * 7 / 50)


@pytest.mark.limit("prefix-rft")
def test_a_bad_token_that_became_likely_has_a_bounded_loss() -> None:
    # card 035 (d): A < 0 and a ratio of 10 give 3|A|, and no gradient
    world = World("prompts", 0, length=1)
    batch = world.batch
    batch.reward = torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 0, 1, 1, 1, 0])
    now = world.policy.log_likelihood(batch).logp.detach()
    batch.old_logp = now - torch.tensor(10.0).log()
    method = methods.prefix_rft(keep=1, entropy=0, length=1, clip=0.2)
    advantage = centred(world.padded())[:, 0]
    expected = torch.where(advantage < 0, 3 * advantage.abs(), -1.2 * advantage).mean()
    loss = loss_of(world, method, prepared(world, method))
    torch.testing.assert_close(loss.value, expected, rtol=1e-9, atol=1e-9)
    assert float(loss.surrogate.detach()) == 0


def test_prefix_rft_trains() -> None:
    method = methods.prefix_rft(length=12)
    run = after(method)
    assert moved(run)
    assert run.metrics[0]["prefix_tokens"] == 9  # 95 % of ten
    assert {"reward_with_prefix", "reward_without_prefix", "negative_entropy"} <= run.metrics[0].keys()
    # several updates: entropies and old log-probabilities stay those of the rollouts
    assert after(method, updates=2, learning_rate=1e-2).metrics[0]["ratio"] != 1


def test_micro_batches_do_not_change_which_tokens_count() -> None:
    whole, parts = (after(methods.prefix_rft(length=12), steps=1, token_budget=n) for n in (4096, 16))
    assert whole.metrics[0]["grad_norm"] == pytest.approx(parts.metrics[0]["grad_norm"], rel=1e-4)
    assert whole.metrics[0]["loss"] == pytest.approx(parts.metrics[0]["loss"], rel=1e-4)


# -- ThinkTuning -----------------------------------------------------------------------------------------------------


def thinktuning_loss(world: World, c: float, clip: float) -> Tensor:
    w = world.padded()
    taught, advantage = written_by(world, "teacher"), centred(w, scale=True)
    rho, p = (w.logp - w.old).exp(), w.logp.exp()
    student = -torch.min(rho * advantage, rho.clamp(1 - clip, 1 + clip) * advantage)
    teacher = -torch.where(advantage > 0, p / (p + c), p) * advantage
    return token_mean(w, torch.where(taught, teacher, student))


@pytest.mark.gradient("thinktuning")
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("c", "clip"), [(0.1, 0.2), (0.5, 0.1)])
def test_thinktuning_is_the_loss_of_the_card(seed: int, c: float, clip: float) -> None:
    method = methods.thinktuning(c=c, clip=clip)
    world = guided_world("teacher", seed=seed, behind=True)
    loss = loss_of(world, method, prepared(world, method))
    expected = thinktuning_loss(world, c, clip)
    torch.testing.assert_close(loss.value, expected.detach(), rtol=1e-9, atol=1e-9)
    assert_equal_gradients(world, loss.surrogate, expected)


def test_thinktuning_takes_a_shape_and_a_kl() -> None:
    def twice(probability: Tensor, advantage: Tensor) -> Tensor:
        return 2 * probability

    method = methods.thinktuning(shape=twice, beta=0.1)
    world = guided_world("teacher", behind=True)
    w = world.padded()
    advantage, d = centred(w, scale=True), w.reference - w.logp
    rho = (w.logp - w.old).exp()
    student = -torch.min(rho * advantage, rho.clamp(0.8, 1.2) * advantage)
    policy = torch.where(written_by(world, "teacher"), -2 * w.logp.exp() * advantage, student)
    loss = loss_of(world, method, prepared(world, method))
    assert_equal_gradients(world, loss.surrogate, token_mean(w, policy + 0.1 * (d.exp() - d - 1)))


@pytest.mark.limit("thinktuning")
def test_without_an_advantage_neither_part_has_a_gradient() -> None:
    # card 085 (c)
    world = guided_world("teacher", behind=True)
    world.batch.reward = torch.ones_like(world.batch.reward)
    method = methods.thinktuning()
    loss = loss_of(world, method, prepared(world, method))
    loss.surrogate.backward()
    assert all(p.grad is None or not p.grad.any() for p in world.policy.parameters.values())


@pytest.mark.limit("thinktuning")
def test_without_feedback_it_is_grpo() -> None:
    # card 085 (a): the same completions, and bit for bit the same weights
    ours, theirs = after(methods.thinktuning(share=0)), after(methods.grpo().replace(aggregate=TokenMean()))
    assert same_weights(ours.policy, theirs.policy)
    assert moved(ours)


def test_thinktuning_trains_with_its_first_policy_as_the_teacher() -> None:
    method = methods.thinktuning(template="{attempt}?", share=0.5)
    assert method.wants_reference
    run = after(method)
    assert moved(run)
    assert {"rescue_rate", "harm_rate"} & run.metrics[0].keys()


def test_thinktuning_trains_with_a_teacher() -> None:
    first, second = (methods.thinktuning(teacher=tiny_policy(n), template="{attempt}?", share=0.5) for n in (8, 9))
    assert not first.wants_reference
    assert first.rollouts == Feedback(0.5, Prompted("{attempt}?"))
    assert not same_weights(after(first).policy, after(second).policy)
