"""MM-UPT and SAPO: their cards' checks, their papers' losses by autograd, and steps in the training loop."""

from __future__ import annotations

import pytest
import torch
from guided_world import assert_equal_gradients, centred, guided_world, loss_of, prepared, token_mean, written_by
from padded_world import World, float64  # noqa: F401 (a fixture)

from posttrain import methods
from posttrain.objective.batch import Batch
from posttrain.objective.denominator import OldPolicy
from posttrain.reward.shapings.majority import MajorityVote
from posttrain.rollout.strategies.swarm import Pool, Record, Shared
from posttrain.training.signals import supply
from posttrain.trajectory import Group, Prompt
from tiny_runs import after, moved, same_weights
from tiny_tasks import Scripted, single_precision, step_context, tiny_policy, tiny_prompts

# -- MM-UPT ----------------------------------------------------------------------------------------------------------


@pytest.mark.gradient("mm-upt")
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("low", "high", "beta"), [(0.2, 0.3, 0.01), (0.1, 0.2, 0.5)])
def test_mm_upt_is_the_papers_loss(seed: int, low: float, high: float, beta: float) -> None:
    method = methods.mm_upt(low=low, high=high, beta=beta)
    world = World("prompts", seed)
    w = world.padded()
    loss = loss_of(world, method, prepared(world, method))
    advantage, rho, d = centred(w, scale=True, eps=1e-6), (w.logp - w.old).exp(), w.reference - w.logp
    policy = -torch.min(rho * advantage, rho.clamp(1 - low, 1 + high) * advantage)
    expected = token_mean(w, policy + beta * (d.exp() - d - 1))
    torch.testing.assert_close(loss.value, expected.detach(), rtol=1e-9, atol=1e-9)
    assert_equal_gradients(world, loss.surrogate, expected)


@pytest.mark.limit("mm-upt")
def test_a_unanimous_group_has_the_gradient_of_the_kl_alone() -> None:
    # card 019 (b)
    method, world = methods.mm_upt(), World("prompts", 0)
    world.batch.reward = torch.ones_like(world.batch.reward)
    w = world.padded()
    d = w.reference - w.logp
    loss = loss_of(world, method, prepared(world, method))
    assert_equal_gradients(world, loss.surrogate * 100, token_mean(w, d.exp() - d - 1))


@pytest.mark.limit("mm-upt")
def test_where_the_vote_is_the_label_it_is_supervised_grpo() -> None:
    # card 019 (c): bit for bit. The labels are what the votes of the same completions come out as.
    method = methods.mm_upt("text").with_settings(temperature=1.0, top_p=1.0)
    gold: dict[int, str] = {}

    class Remembering(MajorityVote):
        def __call__(self, groups: list[Group], context: object) -> None:  # type: ignore[override]
            for group in groups:
                assert group.prompt is not None
                votes = self.votes([t.text for t in group.trajectories])
                gold[group.prompt.key] = max(set(votes) - {None}, key=votes.count)  # type: ignore[arg-type]
            super().__call__(groups, context)  # type: ignore[arg-type]

    def label(completion: str, prompt: Prompt) -> float:
        answer = MajorityVote("text").votes([completion])[0]
        return float(answer is not None and MajorityVote().same(answer, gold[prompt.key]))

    sizes = {"steps": 1, "group": 40, "max_tokens": 1}  # one letter: completions agree now and then
    after(method.replace(shaping=(Remembering("text"),)), **sizes)
    ours = after(method, **sizes)
    theirs = after(method.replace(shaping=()), reward=label, **sizes)
    assert ours.metrics[0]["reward"] > 1 / 40
    assert same_weights(ours.policy, theirs.policy)
    assert moved(ours)


def test_mm_upt_never_looks_at_the_label() -> None:
    right, wrong = (after(methods.mm_upt("text"), reward=lambda text, prompt, r=r: r) for r in (1.0, -3.0))
    assert same_weights(right.policy, wrong.policy)
    assert (right.metrics[0]["label_reward"], wrong.metrics[0]["label_reward"]) == (1.0, -3.0)
    assert "reward/majority" in right.metrics[0]
    settings = methods.mm_upt().settings
    assert (settings.group, settings.temperature, settings.top_p) == (10, 0.7, 0.99)


# -- SAPO ------------------------------------------------------------------------------------------------------------


@pytest.mark.gradient("sapo")
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_sapo_is_the_papers_loss(seed: int, floor: float) -> None:
    method = methods.sapo(floor=floor)
    world = guided_world("replay", seed=seed)
    w = world.padded()
    advantage, rho = centred(w, scale=True), (w.logp - w.old).exp()
    each = -torch.min(rho * advantage, rho.clamp(0.8, 1.28) * advantage)
    implausible = written_by(world, "replay") & (w.logp.detach() < torch.tensor(floor).log())
    assert bool(implausible.any()) is bool(floor)
    expected = token_mean(w, torch.where(implausible, 0, each))
    loss = loss_of(world, method, prepared(world, method))
    torch.testing.assert_close(loss.value, expected.detach(), rtol=1e-9, atol=1e-9)
    assert_equal_gradients(world, loss.surrogate, expected)


def own_and_foreign() -> tuple[Group, Group]:
    """A scored group, and what a clone reads of it."""
    policy, (prompt,) = tiny_policy(), tiny_prompts(1)
    context = step_context(policy, engine=Scripted({prompt.key: ["a1", "22", "bc"]}), group=3)
    (own,) = context.draw([prompt])
    foreign = Record.of(own).read(policy)
    assert foreign is not None
    context.score([foreign])
    return own, foreign


@pytest.mark.limit("sapo")
def test_a_clones_data_have_the_gradient_of_ones_own() -> None:
    # card 053 (b)
    with single_precision():
        method, policy, found = methods.sapo(), tiny_policy(), []
        for group in own_and_foreign():
            batch = Batch.of([group])
            method.objective.prepare(batch)
            loss = method.objective(batch, policy.log_likelihood(batch), batch.totals).surrogate
            found.append(torch.autograd.grad(loss, [p for _, p in policy.trainable_parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert any(bool(g.any()) for g in found[0])


@pytest.mark.limit("sapo")
def test_foreign_ratios_start_at_one() -> None:
    # card 053 (d): the old policy is the node's own, for text that it would hardly have written as well
    with single_precision():
        policy, (_, foreign) = tiny_policy(), own_and_foreign()
        batch = Batch.of([foreign])
        supply(frozenset({"old_logp"}), batch, [foreign], policy, None, None, temperature=1.0, budget=1024)
        logp = policy.log_likelihood(batch).logp
        assert OldPolicy()(batch, logp).weight.tolist() == [1.0] * batch.target.numel()
        assert float(logp.detach().mean()) < -3


@pytest.mark.limit("sapo")
def test_alone_and_without_foreign_groups_it_is_grpo_with_a_higher_clip() -> None:
    sapo = methods.sapo(own=3, foreign=0)
    grpo = methods.dapo().replace(sampler=sapo.sampler, masks=sapo.objective.masks)  # type: ignore[union-attr]
    assert same_weights(after(sapo, updates=2).policy, after(grpo, updates=2).policy)
    assert sapo.settings.batch == 3
    assert methods.sapo().settings.batch == 8
    assert methods.sapo().rollouts == Shared(4, 4, pool=Pool())
