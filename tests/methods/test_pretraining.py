"""RLP and RMT: the cards' checks, limits, and steps in the real loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from padded_world import World
from torch import Tensor

from posttrain import methods
from posttrain.models.causal import CausalPolicy
from posttrain.objective.batch import Batch
from posttrain.reward.reward import reward_from
from posttrain.rollout.context import StepContext
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.strategies.budgeted_thought import Budget, Curriculum, ThinkWithinBudget, length_reward
from posttrain.rollout.strategies.thought import ThinkBeforeNext
from posttrain.training.collect import Online
from posttrain.training.loop import Trainer
from posttrain.training.method import Method
from posttrain.trajectory import Group, PosttrainError, Prompt, Sampling, Trajectory
from tiny_training import TOKENIZER, make_policy, prompts

END = 2
pytestmark = [pytest.mark.limit("rlp", "rmt"), pytest.mark.gradient("rlp", "rmt")]


def documents(count: int = 4) -> list[Prompt]:
    """Prompts with a worked solution of six tokens."""
    found = []
    for i, prompt in enumerate(prompts(count)):
        tokens = torch.cat([prompt.tokens, torch.tensor(TOKENIZER.encode(f"abc{i}de"))])
        own = Trajectory(tokens, torch.arange(len(tokens)) >= len(prompt.tokens), source="expert")
        found.append(replace(prompt, demonstration=own))
    return found


def context_of(
    policy: CausalPolicy, reference: CausalPolicy, max_tokens: int = 6, group: int = 3, **fields
) -> StepContext:
    @contextmanager
    def opened():
        yield reference

    return StepContext(
        step=0, total=10, engine=EmbeddedEngine(policy),
        sampling=Sampling(max_tokens=max_tokens), group=group, score=lambda groups: None, seed=5, policy=policy,
        reference=opened,
    )  # fmt: skip


def log_probability(policy: CausalPolicy, before: Tensor, token: int) -> float:
    with torch.no_grad():
        logits = policy.model(before[None]).logits[0, -1]
    return float(logits.log_softmax(-1)[token])


def test_the_gain_is_that_of_the_next_token_with_the_closed_thought() -> None:
    policy, reference = make_policy(0), make_policy(1)
    strategy = ThinkBeforeNext(open="[", close="]")
    rows = documents()
    groups = strategy(rows, context_of(policy, reference))
    closing = torch.tensor(TOKENIZER.encode("]"))
    for group, prompt in zip(groups, rows, strict=True):
        document = prompt.demonstration.tokens
        for t in group.trajectories:
            start = t.prompt_length
            assert TOKENIZER.decode(t.tokens[start - 1 : start]) == "["
            place = start - 1
            assert torch.equal(t.tokens[:place], document[:place])
            whole = t.tokens
            if not t.text.endswith("]"):
                whole = torch.cat([whole[:-1] if int(whole[-1]) in policy.end_tokens else whole, closing])
            token = int(document[place])
            expected = log_probability(policy, whole, token) - log_probability(reference, document[:place], token)
            assert t.reward == pytest.approx(expected, abs=1e-4)
            assert t.rewards == {"gain": t.reward}


def test_an_empty_thought_of_the_same_policy_gains_nothing() -> None:
    policy = make_policy(0)
    strategy = ThinkBeforeNext(open="", close="")
    document = documents(1)[0].demonstration.tokens
    empty = Trajectory(document[:3], torch.zeros(3, dtype=torch.bool))
    gains = strategy.gains([Group([empty])], [(Prompt(document[:3]), document, 3)], context_of(policy, policy))
    assert float(gains[0][0]) == 0.0


def test_places_within_the_solution_alone_where_that_is_asked() -> None:
    policy = make_policy(0)
    rows = documents(8)
    groups = ThinkBeforeNext("[", "]", within="solution")(rows, context_of(policy, policy))
    for group, prompt in zip(groups, rows, strict=True):
        assert all(t.prompt_length - 1 >= len(prompt.tokens) for t in group.trajectories)


def ended(count: int, letters: str) -> list[Prompt]:
    """Documents whose solutions are followed by the end token."""
    found = []
    for prompt in prompts(count):
        tokens = torch.cat([prompt.tokens, torch.tensor([*TOKENIZER.encode(letters), END])])
        own = Trajectory(tokens, torch.arange(len(tokens)) >= len(prompt.tokens), source="expert")
        found.append(replace(prompt, demonstration=own))
    return found


def test_the_end_token_is_not_thought_about() -> None:
    policy = make_policy(0)
    assert END in policy.end_tokens
    rows = ended(6, "a")
    for group, prompt in zip(
        ThinkBeforeNext("[", "]", within="solution")(rows, context_of(policy, policy)), rows, strict=True
    ):
        assert group.trajectories[0].prompt_length - 1 == len(prompt.tokens)  # the only letter of the solution
    with pytest.raises(PosttrainError, match="no place in it has 9 before"):
        ThinkBeforeNext("[", "]", least=9)(rows, context_of(policy, policy))
    for document, places in zip(
        rows, rmt(chosen=3).rollouts.places([r.demonstration for r in rows], context_of(policy, policy)), strict=True
    ):
        assert places == [len(document.tokens)]


def test_the_advantage_is_leave_one_out_and_unscaled() -> None:
    tokens = torch.tensor([1, 2, 3])
    members = [Trajectory(tokens, torch.arange(3) >= 2, reward=r) for r in (0.75, 0.25)]
    batch = Batch.of([Group(members)])
    methods.rlp().objective.prepare(batch)
    assert batch.advantage.tolist() == [0.5, -0.5]


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
def test_rlp_is_reinforce_with_a_leave_one_out_baseline_before_any_update() -> None:
    world = World("prompts", 0)
    batch = world.fresh()
    batch.old_logp = None
    objective = methods.rlp().objective
    objective.prepare(batch)
    likelihood = world.policy.log_likelihood(batch)
    loss = objective(batch, likelihood, batch.totals).surrogate
    padded = world.padded()
    advantage = torch.zeros_like(padded.reward)
    for rows in padded.groups:
        for i in rows:
            others = [padded.reward[j] for j in rows if j != i]
            advantage[i] = padded.reward[i] - sum(others) / len(others)
    expected = -(advantage * padded.mean(padded.logp)).mean()
    named = list(world.policy.parameters.values())
    found = torch.autograd.grad(loss, named, allow_unused=True)
    wanted = torch.autograd.grad(expected, named, allow_unused=True)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# -- reinforcement mid-training --------------------------------------------------------------------------------------


def test_length_reward_and_budget_and_shares_by_hand() -> None:
    assert [length_reward(n, 10, 2.0) for n in (0, 5, 10, 15, 20, 30)] == [0, 1.0, 2.0, 1.0, 0, 0]
    budget = Budget(800, 0.2, 1)
    assert (budget(0, 100), budget(100, 100)) == (800, 160)
    assert Budget(4, 0.01, 3)(9, 10) == 3
    shares = Curriculum((0.7, 0.2, 0.1), (0.1, 0.3, 0.6), 0.3, 0.7)
    assert shares(0, 100) == (0.7, 0.2, 0.1)
    assert shares(100, 100) == pytest.approx((0.1, 0.3, 0.6))
    assert shares(50, 100) == pytest.approx((0.4, 0.25, 0.35))
    assert all(sum(shares(step, 100)) == pytest.approx(1) for step in range(101))


def rmt(**arguments) -> Method:
    made = {"open": "[", "close": "]", "instruction": "{budget}", "start": 3, "floor": 2, **arguments}
    return methods.rmt(**made).with_settings(steps=2, batch=4, group=3, max_tokens=6, learning_rate=1e-2)


def test_every_solution_token_is_thought_about_or_imitated_and_never_both() -> None:
    policy = make_policy(0)
    strategy = rmt(chosen=2).rollouts
    rows = documents()
    groups = strategy(rows, context_of(policy, make_policy(1)))
    thoughts = [g for g in groups if g.trajectories[0].source == "policy"]
    rest = [g for g in groups if g.trajectories[0].source == "expert"]
    assert (len(thoughts), len(rest)) == (8, 4)
    for i, (prompt, group) in enumerate(zip(rows, rest, strict=True)):
        solution = prompt.demonstration
        chosen = set()
        for thought in thoughts[2 * i : 2 * i + 2]:
            start = thought.trajectories[0].prompt_length - 2  # the budget's digit and the marker
            assert torch.equal(thought.trajectories[0].tokens[:start], solution.tokens[:start])
            chosen.add(start)
        imitated = set(group.trajectories[0].action_mask.nonzero()[:, 0].tolist())
        assert chosen.isdisjoint(imitated)
        assert chosen | imitated == set(solution.action_mask.nonzero()[:, 0].tolist())


def test_the_reward_is_the_prediction_and_the_length() -> None:
    policy = make_policy(0)
    strategy = rmt(weight=0.25).rollouts
    rows = documents()
    groups = [g for g in strategy(rows, context_of(policy, policy)) if g.trajectories[0].source == "policy"]
    for group, prompt in zip(groups, rows, strict=True):
        goal = int(prompt.demonstration.tokens[group.trajectories[0].prompt_length - 2])
        for t in group.trajectories:
            assert t.rewards["right"] == float(int(t.tokens[-1]) == goal)
            assert t.reward == pytest.approx(0.75 * t.rewards["right"] + 0.25 * t.rewards["length"])
            assert bool(t.action_mask[-1])
            said = t.tokens[t.action_mask]
            written = policy.log_likelihood(Batch.of([Group([t])])).logp.detach()
            torch.testing.assert_close(t.behaviour_logp_full[t.action_mask], written, atol=1e-4, rtol=1e-4)
            assert len(said) >= 1


def test_without_length_curriculum_and_imitation_rmt_is_grpo_on_predictions() -> None:
    method = rmt(weight=0.0, curriculum=False, imitation=0.0)
    world = World("prompts", 1)
    batch, twin = world.fresh(), world.fresh()
    method.objective.prepare(batch)
    methods.grpo().objective.prepare(twin)
    likelihood = world.policy.log_likelihood(batch)
    found = method.objective(batch, likelihood, batch.totals)
    wanted = methods.grpo().objective(twin, likelihood, twin.totals)
    torch.testing.assert_close(found.value, wanted.value, rtol=1e-12, atol=0)
    strategy = method.rollouts
    assert strategy.curriculum is None
    assert strategy.weight == 0


def test_with_no_chosen_token_only_the_weighed_imitation_is_left() -> None:
    method = rmt(imitation=0.3)
    world = World("demonstrations", 0)
    batch = world.fresh()
    method.objective.prepare(batch)
    likelihood = world.policy.log_likelihood(batch)
    twin = world.fresh()
    methods.sft().objective.prepare(twin)
    plain = methods.sft().objective(twin, likelihood, twin.totals)
    torch.testing.assert_close(method.objective(batch, likelihood, batch.totals).value, 0.3 * plain.value)


@pytest.mark.parametrize(
    "method", [rmt(), methods.rlp("[", "]").with_settings(steps=2, batch=4, group=3, max_tokens=6)]
)
def test_steps_in_the_real_loop_and_the_tiers_are_kept(method: Method, tmp_path) -> None:
    def trainer() -> Trainer:
        policy = make_policy()
        rows = documents(8)
        source = Online(
            rows,
            method.sampler(rows, 0),
            method.settings,
            EmbeddedEngine(policy),
            reward_from(lambda c, p: 0.0),
            seed=0,
        )
        return Trainer(policy, method, source, folder=tmp_path)

    first = trainer()
    first.stop = lambda: first.progress.step == 1
    assert first.run().status == "interrupted"
    second = trainer()
    assert second.run().status == "finished"
    if isinstance(second.source.strategy, ThinkWithinBudget):
        assert second.source.strategy._parts == first.source.strategy._parts != []
