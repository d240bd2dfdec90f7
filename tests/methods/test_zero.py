"""Zero RL, expert iteration and process rewards: against their papers' losses, in their limits, and in the loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from mixed_world import MixedWorld, assert_same, pooled
from mixed_world import Seen as One
from padded_world import Padded, World, float64  # noqa: F401 (a fixture)
from shaped_world import groups_of, shaped
from test_gradients import by_group, clipped, gradients, k3, loss_of, normalised, token_mean
from torch import Tensor

from conftest import make_model, make_tokenizer
from posttrain import methods
from posttrain.data.difficulty import MatchedLevels
from posttrain.data.sampler import Shuffled
from posttrain.evaluation.task import Task, TaskItem
from posttrain.methods import Method
from posttrain.models.causal import CausalPolicy
from posttrain.objective.batch import Batch
from posttrain.objective.imitation import first_of_its_kind
from posttrain.reward.reward import Reward
from posttrain.training.stage import train_stage
from posttrain.trajectory import Group, PosttrainError, Prompt, Trajectory

# of the world's 12 sequences, in groups of 4, 3, 2 and 3
OUTCOME = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0]
FORMED = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
STEPS = [1.0, 0.0, 0.5, 0.0, 0.25, 1.0, 0.75, 0.0, 1.0, 0.5, 0.0, 0.0]
TEXTS = ["a"] * 12
LAYOUT: list[list[tuple[Any, float]]] = [
    [("policy", 1.0), ("policy", 1.0), ("policy", 0.0), ("policy", 1.0)],
    [("policy", 0.0), ("policy", 0.0)],
    [("policy", 1.0), ("policy", 0.5)],
]


def assert_papers(world: World, method: Method, batch: Batch, paper: Tensor) -> None:
    method.objective.prepare(batch)
    loss = loss_of(world, method, batch, batch.totals)
    torch.testing.assert_close(loss.value, paper.detach(), rtol=1e-9, atol=1e-9)
    wanted = gradients(world, paper)
    for name, found in gradients(world, loss.surrogate).items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-9, atol=1e-9)
    assert max(float(g.abs().max()) for g in wanted.values()) > 1e-6


def entropy_of(world: World) -> Tensor:
    """`[S, T]` entropies of the world's policy, written out."""
    batch = world.batch
    tokens = torch.zeros(len(batch), max(len(t) for t in batch.tokens), dtype=torch.int64)
    for s, own in enumerate(batch.tokens):
        tokens[s, : len(own)] = own
    before = torch.cat([tokens[:, :1], tokens[:, :-1]], 1)
    hidden = world.policy.hidden(before, torch.arange(tokens.shape[1]).expand_as(tokens))
    log_p = (hidden @ world.policy.parameters["head"].T + world.policy.parameters["bias"]).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


# -- zero RL ---------------------------------------------------------------------------------------------------------


def zero_rl_loss(world: World, reward: list[float], beta: float, entropy: float) -> Tensor:
    w: Padded = world.padded()
    advantage = by_group(w, torch.tensor(reward), normalised)[:, None]
    each = -clipped((w.logp - w.old).exp(), advantage, 0.1, 0.1) + beta * k3(w) - entropy * entropy_of(world)
    return token_mean(w, each)


@pytest.mark.gradient("zero-rl")
@pytest.mark.parametrize(
    ("arguments", "reward"),
    [
        ({"correct": "right"}, OUTCOME),
        (
            {"correct": "right", "form": "boxed"},
            [1.0, -0.5, 0.5, -1.0, 1.0, 0.5, 1.0, -1.0, 1.0, 0.5, -0.5, -1.0],
        ),
    ],
)
def test_zero_rl_equals_the_papers_loss(arguments: dict[str, Any], reward: list[float]) -> None:
    world = World("prompts", 1)
    method = methods.zero_rl(clip=0.1, beta=0.3, entropy=0.2, **arguments)
    groups = groups_of(world, TEXTS, [0.3] * 12, right=OUTCOME, boxed=FORMED)
    assert_papers(world, method, shaped(world, method, groups), zero_rl_loss(world, reward, 0.3, 0.2))


@pytest.mark.limit("zero-rl", "grpo")
def test_without_kl_entropy_and_levels_zero_rl_is_grpo_over_tokens() -> None:
    world = World("prompts")
    method = methods.zero_rl(beta=0.0, entropy=0.0, level=None)
    grpo = methods.grpo().replace(aggregate=methods.dapo().objective.aggregate)
    assert method.objective == grpo.objective
    assert method.sampler is Shuffled
    batch, twin = shaped(world, method, groups_of(world, TEXTS, OUTCOME)), world.fresh()
    twin.reward, twin.reference_logp = torch.tensor(OUTCOME), None
    found, wanted = (_gradient(world, m, b) for m, b in ((method, batch), (grpo, twin)))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_levels_are_measured_by_what_is_right() -> None:
    sampler = methods.zero_rl(correct="answer", level="tier", low=0.2, high=0.6).sampler(
        [Prompt(torch.tensor([1]), meta={"tier": tier}) for tier in "ab"], 3
    )
    assert isinstance(sampler, MatchedLevels)
    assert (sampler.component, sampler.low, sampler.high, sorted(sampler.levels)) == ("answer", 0.2, 0.6, ["a", "b"])


def test_the_form_needs_to_know_what_is_right() -> None:
    with pytest.raises(PosttrainError, match="form='boxed' needs correct="):
        methods.zero_rl(form="boxed")


def _gradient(world: World, method: Method, batch: Batch) -> dict[str, Tensor]:
    method.objective.prepare(batch)
    return gradients(world, loss_of(world, method, batch, batch.totals).surrogate)


# -- expert iteration ------------------------------------------------------------------------------------------------


def test_completions_repeat_within_their_group_alone() -> None:
    mask = torch.tensor([False, True])
    a, b = (Trajectory(torch.tensor([1, last]), mask) for last in (2, 3))
    batch = Batch.of([Group([a, b, a]), Group([a, a])])
    assert first_of_its_kind(batch).tolist() == [True, True, False, True, False]


@pytest.mark.gradient("expert-iteration")
@pytest.mark.parametrize("success", [1.0, 0.5])
@pytest.mark.parametrize("budget", [None, 1])
def test_expert_iteration_equals_sft_on_right_and_different_ones(success: float, budget: int | None) -> None:
    world = MixedWorld(LAYOUT, seed=6)
    world.batch = _with_tokens(world, 1, world.batch.tokens[0].clone(), int(world.batch.lengths[0]))

    def paper(seen: list[One]) -> Tensor:
        return pooled([-s.logp for i, s in enumerate(seen) if s.reward >= success and i != 1])

    assert_same(world.of_method(methods.expert_iteration(success), budget), world.of_paper(paper))


def _with_tokens(world: MixedWorld, row: int, tokens: Tensor, actions: int) -> Batch:
    """The world's batch in which one sequence is another, its signals drawn anew."""
    batch, groups = world.batch, []
    for s, own in enumerate(batch.tokens):
        mine = tokens if s == row else own
        count = actions if s == row else int(batch.lengths[s])
        reward = float(batch.reward[s])
        member = Trajectory(mine, torch.arange(len(mine)) >= len(mine) - count, reward=reward)
        if s == 0 or int(batch.group[s]) != int(batch.group[s - 1]):
            groups.append(Group([]))
        groups[-1].trajectories.append(member)
    made = Batch.of(groups)
    made.reward, made.weight = made.reward.double(), made.weight.double()
    now = world.policy.log_likelihood(made).logp.detach()
    return replace(made, old_logp=now, reference_logp=now.clone(), teacher_logp=now.clone())


@pytest.mark.limit("expert-iteration", "raft")
def test_where_all_completions_differ_or_may_repeat_it_is_rejection_sampling() -> None:
    world = MixedWorld(LAYOUT, seed=7)
    assert bool(first_of_its_kind(world.batch).all())
    raft = world.of_method(methods.raft())
    assert_same(world.of_method(methods.expert_iteration()), raft, 1e-15)
    world.batch = _with_tokens(world, 1, world.batch.tokens[0].clone(), int(world.batch.lengths[0]))
    raft = world.of_method(methods.raft())
    assert_same(world.of_method(methods.expert_iteration(distinct=False)), raft, 1e-15)
    assert float(world.of_method(methods.expert_iteration())[0]) != pytest.approx(float(raft[0]))


# -- process rewards -------------------------------------------------------------------------------------------------


@pytest.mark.gradient("process-grpo")
def test_process_grpo_equals_the_papers_loss() -> None:
    world = World("prompts", 2)
    method = methods.process_grpo(clip=0.1, beta=0.3)
    groups = groups_of(world, TEXTS, [0.0] * 12, answer=OUTCOME, process=STEPS)
    w = world.padded()
    reward = torch.tensor([0.2 + 0.8 * p if r else 0.0 for r, p in zip(OUTCOME, STEPS, strict=True)])
    advantage = by_group(w, reward, normalised)[:, None]
    paper = w.mean(-clipped((w.logp - w.old).exp(), advantage, 0.1, 0.1) + 0.3 * k3(w)).mean()
    assert_papers(world, method, shaped(world, method, groups), paper)


@pytest.mark.limit("process-grpo", "grpo")
def test_with_the_outcome_alone_it_is_grpo() -> None:
    world = World("prompts")
    method, grpo = methods.process_grpo(1.0, 0.0, beta=0.001), methods.grpo(beta=0.001)
    groups = groups_of(world, TEXTS, [0.0] * 12, answer=OUTCOME, process=STEPS)
    batch, twin = shaped(world, method, groups), world.fresh()
    twin.reward = torch.tensor(OUTCOME)
    found, wanted = (_gradient(world, m, b) for m, b in ((method, batch), (grpo, twin)))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# -- in the loop -----------------------------------------------------------------------------------------------------


def letters(completion: str, prompt: Prompt) -> float:
    return sum(c.isalpha() for c in completion) / (1 + len(completion))


def right(completion: str, prompt: Prompt) -> float:
    return float(letters(completion, prompt) > 0.2 and prompt.meta["domain"] != "never")


@pytest.mark.parametrize(
    ("method", "metrics"),
    [
        (methods.zero_rl(correct="answer", form="process"), {"correct", "well_formed", "pass_rate/never", "matched"}),
        (methods.expert_iteration(), set()),
        (methods.process_grpo(), {"process", "false_right"}),
    ],
    ids=["zero-rl", "expert-iteration", "process-grpo"],
)
def test_steps_in_the_loop(method: Method, metrics: set[str]) -> None:
    torch.set_default_dtype(torch.float32)
    policy = CausalPolicy(make_model(), make_tokenizer(), "tiny")
    items = [TaskItem(f"x{i}\ny{i}\nwhere?", meta={"domain": ("some", "never")[i % 2]}) for i in range(8)]
    task = Task("letters", items, [], Reward({"answer": (right, 1.0), "process": (letters, 0.0)}))
    before = [p.detach().clone() for p in policy.model.parameters()]
    small = method.with_settings(steps=2, batch=4, group=6, max_tokens=6, warmup=0.0, learning_rate=1e-3)
    result = train_stage(policy, small, task)
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))
    assert metrics <= set(result.metrics[0])
    if method.name == "zero-rl":
        assert result.metrics[0]["matched"] == 0.5
        assert result.rollouts == 2 * 4 * 6 + 8 * 4  # the probe: all eight prompts four times
