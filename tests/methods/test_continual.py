"""RIF-RFT and RECAP: their losses against their papers', their limits, and both in the real loop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from padded_world import Padded, World
from torch import Tensor

from posttrain import methods
from posttrain.data.instance_filter import Competent
from posttrain.evaluation.task import Task, TaskItem
from posttrain.methods import Method
from posttrain.objective.batch import Batch
from posttrain.objective.likelihood import Likelihood
from posttrain.objective.reweight import ConvergenceWeights, Reweighted
from posttrain.reward.reward import reward_from
from posttrain.trajectory import Group, PosttrainError, Prompt, Trajectory
from resumable import run, small, stopped_and_resumed, trainer
from tiny_tasks import letters, tiny_policy

Found = tuple[Tensor, list[Tensor]]


@pytest.fixture
def exact() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def gradient(world: World, loss: Tensor) -> list[Tensor]:
    parameters = list(world.policy.parameters.values())
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


def of_method(world: World, method: Method, budget: int | None = None, batch: Batch | None = None) -> Found:
    batch = world.fresh() if batch is None else batch
    batch.facts = dict(batch.facts)
    method.objective.prepare(batch)
    parts = [batch] if budget is None else batch.split(budget, keep_groups=False)
    losses = [method.objective(part, world.policy.log_likelihood(part), batch.totals) for part in parts]
    gradients = [gradient(world, loss.surrogate) for loss in losses]
    value = torch.stack([loss.value for loss in losses]).sum()
    return value, [torch.stack(each).sum(0) for each in zip(*gradients, strict=True)]


def assert_same(found: Found, value: Tensor, wanted: list[Tensor]) -> None:
    torch.testing.assert_close(found[0], value.detach(), rtol=1e-9, atol=1e-9)
    assert max(float(g.abs().max()) for g in wanted) > 1e-6  # or nothing was compared
    for a, b in zip(found[1], wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def normalised(w: Padded, rewards: Tensor, rows: list[int]) -> Tensor:
    """GRPO's advantages of some rows within their groups, `[rows]`."""
    advantage = torch.zeros(len(rewards))
    for group in w.groups:
        own = [i for i in group if i in rows]
        if own:
            advantage[own] = (rewards[own] - rewards[own].mean()) / (rewards[own].std() + 1e-4)
    return advantage[rows]


def clipped(w: Padded, advantage: Tensor, rows: list[int], clip: float = 0.2) -> Tensor:
    """Mean over some rows of the mean over their tokens."""
    ratio = (w.logp - w.old).exp()[rows]
    each = -torch.min(ratio * advantage[:, None], ratio.clamp(1 - clip, 1 + clip) * advantage[:, None])
    return ((each * w.mask[rows]).sum(1) / w.mask[rows].sum(1)).mean()


def kl(w: Padded) -> Tensor:
    d = w.reference - w.logp
    return w.mean(d.exp() - d - 1).mean()


# -- RIF-RFT ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("exact")
@pytest.mark.gradient("rif-rft")
@pytest.mark.parametrize(("beta", "clip"), [(0.0, 0.2), (0.3, 0.1)])
def test_rif_rft_has_grpos_loss(beta: float, clip: float) -> None:
    world = World("prompts", 1)
    w = world.padded()
    every = list(range(len(w.reward)))
    value = clipped(w, normalised(w, w.reward, every), every, clip) + beta * kl(w)
    assert_same(of_method(world, methods.rif_rft(beta=beta, clip=clip)), value, gradient(world, value))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("right", [0, 1, 2, 3, 4])
def test_what_is_always_or_never_right_moves_nothing(right: int) -> None:  # card 004 (c)
    # a bandit of four arms, drawn exactly in proportion; one logit is shared by all arms that are right
    logits = torch.zeros(4, requires_grad=True)
    logp = torch.log_softmax(logits, 0)
    reward = (torch.arange(4) < right).to(torch.float64)
    p = right / 4
    expected = torch.autograd.grad((logp.exp().detach() * (reward - p) * logp).sum(), logits)[0]
    assert float(expected.norm()) == pytest.approx(0) if right in (0, 4) else float(expected.norm()) > 0.1
    if right == 1:
        assert float(expected.max()) == pytest.approx(p * (1 - p))
        assert int(expected.argmax()) == 0
    mask = torch.tensor([False, True])
    made = [Trajectory(torch.tensor([0, arm]), mask, reward=float(reward[arm])) for arm in range(4)]
    batch = Batch.of([Group(made)])
    objective = methods.reinforce("group").objective
    objective.prepare(batch)
    loss = objective(batch, Likelihood(torch.log_softmax(logits, 0)[batch.target]), batch.totals)
    found = -torch.autograd.grad(loss.surrogate, logits)[0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def puzzles(count: int = 9, **more: object) -> Task:
    """Of three problems one is never solved, one always, one sometimes."""
    items = [TaskItem(f"p{i}:", str(i), {"kind": ("never", "always", "sometimes")[i % 3]}) for i in range(count)]
    return Task("puzzles", items, [], reward_from(solved), **more)  # type: ignore[arg-type]


def solved(completion: str, prompt: Prompt) -> float:
    return {"never": 0.0, "always": 1.0}.get(prompt.meta["kind"], float(len(completion) % 2))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.limit("rif-rft", "grpo")
def test_without_a_threshold_it_is_grpo() -> None:  # card 004 (b)
    everything = run(small(methods.rif_rft(threshold=-math.inf)), puzzles(), tiny_policy)
    assert same(everything, run(small(methods.grpo()), puzzles(), tiny_policy))


def test_the_policy_of_the_stages_start_decides_what_is_kept() -> None:
    made = trainer(small(methods.rif_rft(samples=4)), puzzles(), tiny_policy())
    made.run()
    sampler = made.source.sampler
    assert isinstance(sampler, Competent)
    assert sampler.counts is not None
    assert sampler.counts[0::3] == [0] * 3
    assert sampler.counts[1::3] == [4] * 3
    assert {row % 3 for row in sampler.kept} == {1, 2}
    assert made.progress.rollouts == 9 * 4 + 4 * 3 * 4, "the tries are counted, once"
    collected = made.source.collect(4)
    assert collected.metrics["competent"] == len(sampler.kept) / 9
    assert {g.prompt.meta["kind"] for g in collected.groups if g.prompt} <= {"always", "sometimes"}


def test_a_stopped_filter_is_not_made_again(tmp_path: Path) -> None:
    method = small(methods.rif_rft(samples=3))
    whole = run(method, puzzles(), tiny_policy)
    assert same(stopped_and_resumed(method, puzzles(), tiny_policy, tmp_path), whole)


def test_where_nothing_is_solved_there_is_nothing_to_train_on() -> None:
    hopeless = replace(puzzles(), reward=reward_from(lambda completion, prompt: 0.0))
    with pytest.raises(PosttrainError, match="none of 9 prompts is solved at least once in 2 tries"):
        trainer(small(methods.rif_rft(samples=2)), hopeless, tiny_policy()).run()


# -- RECAP -----------------------------------------------------------------------------------------------------------

NEW, OLD = [0, 1, 2, 3, 4, 5, 6], [7, 8]  # rows of the padded world's groups 0 and 1, and 2
SHOWN = [9, 10, 11]  # and of group 3, which is imitated


def channelled(seed: int = 0) -> World:
    """The world's groups as two domains that are tried and one that is imitated."""
    world = World("prompts", seed)
    batch = world.batch
    count = len(batch)
    domains = {"new": NEW, "old": OLD, "copy": SHOWN}
    for name, rows in domains.items():
        mark = torch.full((count,), float("nan"))
        mark[rows] = 1.0
        batch.facts[f"channel/{name}"] = mark
    batch.source = batch.source.clone()
    batch.source[SHOWN] = 3  # replay
    assert [len(g) for g in world.padded().groups] == [4, 3, 2, 3]
    return world


def prepared(method: Method, histories: dict[str, list[float]]) -> Method:
    """With values already observed, but for the one of this batch."""
    assert isinstance(method.objective, Reweighted)
    method.objective.weights.history.update({name: list(own) for name, own in histories.items()})
    return method


HISTORIES = {"new": [0.9, 0.8, 0.7], "old": [0.2, 0.5, 0.1], "copy": [3.0, 3.0, 3.0]}


def lambdas(histories: dict[str, list[float]], temperature: float) -> dict[str, float]:
    """By the card, with windows of two."""
    s = {}
    for name, (a, b, c, d) in histories.items():
        newer, older = (c + d) / 2, (a + b) / 2
        sigma = abs(c - d) / 2
        s[name] = min(newer / older, 2.0) + sigma / (newer + older)
    total = sum(math.exp(x / temperature) for x in s.values())
    return {name: len(s) * math.exp(x / temperature) / total for name, x in s.items()}


@pytest.mark.usefixtures("exact")
@pytest.mark.gradient("recap")
@pytest.mark.parametrize("budget", [None, 12])
def test_recap_is_the_weighted_sum_of_its_objectives(budget: int | None) -> None:
    world = channelled()
    w = world.padded()
    nll = -((w.old * w.mask)[SHOWN].sum() / w.mask[SHOWN].sum())
    now = {"new": 1 - w.reward[NEW].mean(), "old": 1 - w.reward[OLD].mean(), "copy": nll}
    weight = lambdas({name: [*own, float(now[name])] for name, own in HISTORIES.items()}, 0.5)
    assert max(weight.values()) - min(weight.values()) > 0.3
    losses = {
        "new": clipped(w, normalised(w, w.reward, NEW), NEW),
        "old": clipped(w, normalised(w, w.reward, OLD), OLD),
        "copy": -(w.logp * w.mask)[SHOWN].sum() / w.mask[SHOWN].sum(),
    }
    value = torch.stack([weight[name] * loss for name, loss in losses.items()]).sum() / 3
    method = prepared(methods.recap(imitate=("copy",), window=2, tau=0.5), HISTORIES)
    assert_same(of_method(world, method, budget), value, gradient(world, value))


@pytest.mark.usefixtures("exact")
@pytest.mark.gradient("recap")
def test_components_have_an_advantage_each() -> None:
    world = World("prompts", 2)
    w = world.padded()
    w.old = w.logp.detach()
    world.batch.old_logp = w.old[world.batch.sequence, world.batch.place]
    every = list(range(len(w.reward)))
    histories = {"right": [0.9, 0.4, 0.7], "short": [0.5, 0.5, 0.5]}
    now = {name: [*own, 1 - float(w.rewards[name].mean())] for name, own in histories.items()}
    weight = lambdas(now, 0.3)
    losses = [weight[n] * clipped(w, normalised(w, w.rewards[n], every), every) for n in histories]
    value = torch.stack(losses).sum() / 2 + 0.2 * kl(w)
    method = prepared(methods.recap(components=("right", "short"), window=2, tau=0.3, beta=0.2), histories)
    assert_same(of_method(world, method), value, gradient(world, value))


@pytest.mark.usefixtures("exact")
@pytest.mark.limit("recap", "grpo")
def test_recap_on_one_domain_is_grpo() -> None:
    world, other = World("prompts", 3), World("prompts", 3)
    world.batch.facts["channel/all"] = torch.ones(len(world.batch))
    found, wanted = of_method(world, methods.recap(beta=0.1)), of_method(other, methods.grpo(beta=0.1))
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-12, atol=1e-12)
    for a, b in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("exact")
@pytest.mark.limit("recap")
def test_at_infinite_temperature_all_objectives_weigh_alike() -> None:
    world, other = channelled(), channelled()
    flat = prepared(methods.recap(imitate=("copy",), window=2, tau=math.inf), HISTORIES)
    fresh = methods.recap(imitate=("copy",), window=2)  # no history yet: all weights are 1
    found, wanted = of_method(world, flat), of_method(other, fresh)
    torch.testing.assert_close(found[0], wanted[0])
    for a, b in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def world_of_tasks(count: int = 12) -> Task:
    names = ("new", "old", "copy")
    items = [TaskItem(f"p{i}:", str(i), {"domain": names[i % 3]}, solution="abc" + str(i)) for i in range(count)]
    return Task("tasks", items, [], reward_from(letters))


def test_recap_replays_in_the_loop(tmp_path: Path) -> None:
    method = small(methods.recap(imitate=("copy",), window=1), batch=6)
    made = trainer(method, world_of_tasks(), tiny_policy())
    rows: list[dict[str, float]] = []
    made.tracker.step = lambda step, seconds, metrics, groups: rows.append(metrics)  # type: ignore[method-assign]
    made.run()
    assert isinstance(made.objective, Reweighted)
    assert set(made.objective.weights.history) == {"new", "old", "copy"}
    assert {"weight/new", "weight/old", "weight/copy", "share/new"} <= rows[-1].keys()
    assert sum(rows[-1][f"weight/{name}"] for name in ("new", "old", "copy")) == pytest.approx(3)
    assert "replay_logp" in rows[-1]
    assert isinstance(method.objective, Reweighted)
    assert method.objective.weights == ConvergenceWeights(1), "each run has a history of its own"
    assert not method.objective.weights.history
    whole = run(method, world_of_tasks(), tiny_policy)
    assert same(stopped_and_resumed(method, world_of_tasks(), tiny_policy, tmp_path), whole)
