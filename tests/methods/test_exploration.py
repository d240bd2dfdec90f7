"""DARLING and RepExp: whole methods in their limits, against their papers' losses, and in the training loop."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from padded_world import Padded, World, float64  # noqa: F401 (a fixture)
from shaped_world import groups_of, shaped
from test_gradients import by_group, centred, clipped, gradients, k3, loss_of, normalised, token_mean
from torch import Tensor

from conftest import make_model, make_tokenizer
from posttrain import methods
from posttrain.evaluation.task import Task, TaskItem
from posttrain.methods import Method
from posttrain.models.causal import CausalPolicy
from posttrain.objective.batch import Batch
from posttrain.reward.reward import Reward
from posttrain.reward.sameness import Pair
from posttrain.reward.shapings.diversity import Diversity
from posttrain.training.stage import train_stage

# of the world's 12 sequences, in groups of 4, 3, 2 and 3
TEXTS = ["a", "a", "b", "c", "d", "d", "d", "e", "f", "g", "h", "g"]
REWARDS = [1.0, 0.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.25]
DIVERSITY = [2 / 3, 2 / 3, 1, 1, 0, 0, 0, 1, 1, 1 / 2, 1, 1 / 2]


def frozen() -> CausalPolicy:
    torch.set_default_dtype(torch.float32)
    policy = CausalPolicy(make_model(3), make_tokenizer(), "tiny")
    _ = policy.packs
    return policy


def assert_papers(world: World, method: Method, batch: Batch, paper: Tensor) -> None:
    method.objective.prepare(batch)
    loss = loss_of(world, method, batch, batch.totals)
    torch.testing.assert_close(loss.value, paper.detach(), rtol=1e-9, atol=1e-9)
    wanted = gradients(world, paper)
    for name, found in gradients(world, loss.surrogate).items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-9, atol=1e-9)
    assert max(float(g.abs().max()) for g in wanted.values()) > 1e-6
    masked, tokens = loss.metrics["clip_fraction"]
    assert 0 < masked < tokens


def gradient(world: World, method: Method, batch: Batch) -> dict[str, Tensor]:
    method.objective.prepare(batch)
    return gradients(world, loss_of(world, method, batch, batch.totals).surrogate)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert max(float(g.abs().max()) for g in a.values()) > 1e-6
    return all(torch.equal(a[name], b[name]) for name in a)


def token_level(w: Padded, advantage: Tensor, clip: float, beta: float) -> Tensor:
    return token_mean(w, -clipped((w.logp - w.old).exp(), advantage[:, None], clip, clip) + beta * k3(w))


# -- DARLING ---------------------------------------------------------------------------------------------------------


@pytest.mark.gradient("darling")
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_darling_equals_the_papers_loss(beta: float) -> None:
    world = World("prompts", 1)
    method = methods.darling(clip=0.1, beta=beta)
    batch = shaped(world, method, groups_of(world, TEXTS, REWARDS))
    padded = world.padded()
    quality, diversity = torch.tensor(REWARDS), torch.tensor(DIVERSITY)
    advantage = by_group(padded, quality * diversity.clamp(min=0.1), centred)
    assert_papers(world, method, batch, token_level(padded, advantage, 0.1, beta))


@pytest.mark.limit("darling", "dr-grpo")
def test_where_all_completions_differ_darling_is_grpo_without_the_deviation() -> None:
    world = World("prompts")
    method = methods.darling()
    batch = shaped(world, method, groups_of(world, [str(i) for i in range(12)], REWARDS))
    plain = world.fresh()
    plain.reward, plain.reference_logp = torch.tensor(REWARDS), None
    # Dr. GRPO divides by the number of completions and a constant length; here every token weighs the same
    dr_grpo = methods.dr_grpo().replace(aggregate=method.objective.aggregate)  # type: ignore[union-attr]
    assert same(gradient(world, method, batch), gradient(world, dr_grpo, plain))


@pytest.mark.limit("darling")
def test_where_all_are_the_same_and_right_nothing_is_learned() -> None:
    world = World("prompts")
    method = methods.darling()
    batch = shaped(world, method, groups_of(world, ["x"] * 12, [1.0] * 12))
    torch.testing.assert_close(batch.reward, torch.full((12,), 0.1))
    method.objective.prepare(batch)
    assert batch.advantage is not None
    assert not batch.advantage.any()


def test_arguments_of_darling_choose_the_measure() -> None:
    world = World("prompts")
    given = groups_of(world, ["Answer: 1", "1", "2", "3"] * 3, [1.0] * 12)
    first = [t.reward for t in given[0].trajectories]
    batch = shaped(world, methods.darling("answer"), given)
    assert first == [1.0] * 4
    assert batch.reward[:4].tolist() == pytest.approx([2 / 3, 2 / 3, 1, 1])
    words = shaped(world, methods.darling(ngrams=1), groups_of(world, ["a b", "a c", "d", "e"] * 3, [1.0] * 12))
    assert words.reward[:4].tolist() == pytest.approx([0.5, 0.5, 1, 1])
    added = methods.darling(combine="add", weight=0.5)
    assert shaped(world, added, groups_of(world, TEXTS, REWARDS)).reward[:2].tolist() == pytest.approx([4 / 3, 1 / 3])
    (diversity,) = methods.darling(shift=True, correct_only=True, floor=0.2).shaping
    assert isinstance(diversity, Diversity)
    assert (diversity.shift, diversity.correct_only, diversity.floor) == (True, True, 0.2)


# -- RepExp ----------------------------------------------------------------------------------------------------------


def elliptical(policy: CausalPolicy, world: World, ridge: float) -> Tensor:
    """Bonuses by the definition, from the model's own forward pass, a sequence at a time."""
    states = []
    for s, tokens in enumerate(world.batch.tokens):
        with torch.no_grad():
            hidden = policy.body(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
        states.append(hidden[world.batch.place[world.batch.sequence == s]].double().mean(0))
    bonus = torch.empty(len(states), dtype=torch.float64)
    for number in world.batch.group.unique():
        own = (world.batch.group == number).nonzero()[:, 0].tolist()
        v = torch.stack([states[i] for i in own])
        v = v - v.mean(0)
        inverse = torch.linalg.inv(ridge * torch.eye(v.shape[1], dtype=torch.float64) + v.T @ v)
        bonus[own] = torch.stack([row @ inverse @ row for row in v])
    return bonus


@pytest.mark.gradient("rep-exp")
def test_rep_exp_equals_the_papers_loss() -> None:
    world = World("prompts", 1)
    policy = frozen()
    bonus = elliptical(policy, world, ridge=0.5)
    torch.set_default_dtype(torch.float64)
    method = methods.rep_exp(weight=0.3, ridge=0.5, dimensions=10_000, clip=0.1)  # wider than the model: no projection
    wrong = [0.0 if i in (7, 8) else r for i, r in enumerate(REWARDS)]  # a group without a right completion
    batch = shaped(world, method, groups_of(world, TEXTS, wrong), reference=lambda: policy)
    bonus[[7, 8]] = 0.0
    assert batch.reward[[7, 8]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(batch.reward, torch.tensor(wrong) + 0.3 * bonus, rtol=1e-4, atol=1e-5)
    # the model computes in fp32: what is compared to 1e-9 is the loss, given the bonuses
    given = (batch.reward - torch.tensor(wrong)) / 0.3
    padded = world.padded()
    advantage = by_group(padded, torch.tensor(wrong) + 0.3 * given, normalised)
    assert_papers(world, method, batch, token_level(padded, advantage, 0.1, 0.0))


@pytest.mark.limit("rep-exp", "grpo")
def test_without_weight_rep_exp_is_grpo_with_a_mean_over_tokens() -> None:
    world = World("prompts")
    method = methods.rep_exp(weight=0.0)
    policy = frozen()
    torch.set_default_dtype(torch.float64)
    batch = shaped(world, method, groups_of(world, TEXTS, REWARDS), reference=lambda: policy)
    plain = world.fresh()
    plain.reward, plain.reference_logp = torch.tensor(REWARDS), None
    grpo = methods.grpo().replace(aggregate=method.objective.aggregate)  # type: ignore[union-attr]
    assert same(gradient(world, method, batch), gradient(world, grpo, plain))


# -- in the loop -----------------------------------------------------------------------------------------------------


def alike(pairs: Sequence[Pair]) -> list[bool]:
    return [len(a) == len(b) for a, b in pairs]


def letters(completion: str, prompt: object) -> float:
    return float(sum(c.isalpha() for c in completion) > 1)


@pytest.mark.parametrize("method", [methods.darling(alike), methods.rep_exp()], ids=lambda m: m.name)
def test_a_step_in_the_loop(method: Method) -> None:
    torch.set_default_dtype(torch.float32)
    policy = CausalPolicy(make_model(), make_tokenizer(), "tiny")
    task = Task("letters", [TaskItem(f"p{i}") for i in range(6)], [], Reward({"letters": (letters, 1.0)}))
    before = [p.detach().clone() for p in policy.model.parameters()]
    result = train_stage(policy, method.with_settings(steps=2, batch=4, group=6, max_tokens=6, warmup=0.0), task)
    figures = result.metrics[0]
    name = "diversity" if method.name == "darling" else "novelty"
    assert 0 < figures[name] <= 1
    assert figures["grad_norm"] > 0
    assert figures["reward/letters"] != figures["reward"]  # what the task gave, and what is trained on
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))
