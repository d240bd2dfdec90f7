"""DUMP, Curr-ReFT and MoDoMoDo: their losses against their papers', and the curricula in the real loop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from padded_world import Padded, World
from torch import Tensor

from posttrain import methods
from posttrain.data.bandit import UpperConfidence
from posttrain.evaluation.reposed import reposed
from posttrain.evaluation.task import Task, TaskItem
from posttrain.methods import Method
from posttrain.objective.batch import Batch
from posttrain.reward.reward import Reward, reward_from
from posttrain.reward.verifiers import Regex
from posttrain.training.method import Pipeline
from posttrain.training.stage import train_stage
from posttrain.trajectory import PosttrainError, Prompt
from resumable import run, small, stopped_and_resumed, trainer
from tiny_tasks import letters, tiny_policy

Found = tuple[Tensor, list[Tensor]]


def of_method(world: World, method: Method, batch: Batch | None = None) -> Found:
    batch = world.fresh() if batch is None else batch
    method.objective.prepare(batch)
    loss = method.objective(batch, world.policy.log_likelihood(batch), batch.totals)
    return loss.value, gradient(world, loss.surrogate)


def gradient(world: World, loss: Tensor) -> list[Tensor]:
    parameters = list(world.policy.parameters.values())
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


def assert_same(found: Found, value: Tensor, wanted: list[Tensor]) -> None:
    torch.testing.assert_close(found[0], value.detach(), rtol=1e-9, atol=1e-9)
    assert max(float(g.abs().max()) for g in wanted) > 1e-6  # or nothing was compared
    for a, b in zip(found[1], wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def advantages(w: Padded) -> Tensor:
    advantage = torch.empty_like(w.reward)
    for rows in w.groups:
        own = w.reward[rows]
        advantage[rows] = (own - own.mean()) / (own.std() + 1e-4)
    return advantage[:, None]


def k3(w: Padded) -> Tensor:
    d = w.reference - w.logp
    return d.exp() - d - 1


def clipped_loss(w: Padded, clip: float, beta: float) -> Tensor:
    ratio, a = (w.logp - w.old).exp(), advantages(w)
    return w.mean(-torch.min(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a) + beta * k3(w)).mean()


@pytest.fixture
def exact() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("exact")
@pytest.mark.gradient("dump", "modomodo")
@pytest.mark.parametrize(
    ("method", "clip", "beta"),
    [
        (methods.dump(), 0.2, 0.001),
        (methods.dump(clip=0.1, beta=0.3), 0.1, 0.3),
        (methods.modomodo(), 0.2, 0.04),
        (methods.modomodo(beta=0.5, clip=0.3), 0.3, 0.5),
    ],
)
def test_the_loss_is_the_papers(method: Method, clip: float, beta: float) -> None:
    world = World("prompts", 3)
    value = clipped_loss(world.padded(), clip, beta)
    assert_same(of_method(world, method), value, gradient(world, value))


def before_any_update(seed: int) -> tuple[World, Padded]:
    """A world with one update a step: no old log-probabilities, which are the present ones."""
    world = World("prompts", seed)
    padded = world.padded()
    padded.old = padded.logp.detach()
    world.batch.old_logp = None
    return world, padded


@pytest.mark.usefixtures("exact")
@pytest.mark.gradient("curr-reft")
def test_the_stages_of_curr_reft_have_the_papers_loss() -> None:
    judge, choice, open_, closing = methods.curr_reft(beta=0.3, accept=0.5).stages
    for stage in (judge, choice, open_):
        world, w = before_any_update(1)
        value = w.mean(-((w.logp - w.old).exp() * advantages(w) - 0.3 * k3(w))).mean()
        assert_same(of_method(world, stage), value, gradient(world, value))
    world, w = before_any_update(2)
    accepted = (w.reward >= 0.5)[:, None] * w.mask
    value = -(accepted * w.logp).sum() / accepted.sum()
    assert_same(of_method(world, closing), value, gradient(world, value))


@pytest.mark.limit("curr-reft", "grpo")
def test_curr_reft_with_open_answers_alone_is_grpo() -> None:  # card 014 (a)
    (stage,) = methods.curr_reft(judge=0, choice=0, closing=0).stages
    world, other = before_any_update(4)[0], before_any_update(4)[0]
    found, wanted = of_method(world, stage), of_method(other, methods.grpo(beta=0.04))
    assert torch.equal(found[0], wanted[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], wanted[1], strict=True))


@pytest.mark.usefixtures("exact")
def test_a_group_without_variance_leaves_the_kl_alone() -> None:  # card 014 (c)
    stage = methods.curr_reft(beta=0.3).stages[0]
    world, w = before_any_update(5)
    world.batch.reward = torch.full_like(world.batch.reward, 0.7)
    kl = 0.3 * w.mean(k3(w)).mean()
    assert_same(of_method(world, stage), kl, gradient(world, kl))


def test_curr_reft_has_three_formats_and_a_careful_end() -> None:
    made = methods.curr_reft()
    assert [stage.name for stage in made.stages] == [f"curr-reft-{n}" for n in ("judge", "choice", "open", "closing")]
    assert [stage.settings.steps for stage in made.stages] == [600, 550, 2300, 2000]
    assert [stage.settings.group for stage in made.stages] == [4, 2, 4, 4]
    assert made.stages[3].settings.learning_rate == made.stages[2].settings.learning_rate / 5
    assert len(methods.curr_reft(closing=0).stages) == 3
    with pytest.raises(PosttrainError, match="some above"):
        methods.curr_reft(0, 0, 0, 0)


# -- in the real loop ------------------------------------------------------------------------------------------------


def levels(count: int = 12, names: tuple[str, ...] = ("easy", "hard")) -> Task:
    items = [TaskItem(f"p{i}:", str(i), {"domain": names[i % len(names)]}) for i in range(count)]
    return Task("levels", items, [], reward_from(letters))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.limit("dump", "modomodo", "grpo")
def test_with_one_domain_the_curricula_are_grpo() -> None:
    task = levels(names=("all",))
    plain = run(small(methods.grpo(beta=0.1)), task, tiny_policy)
    assert same(run(small(methods.dump(beta=0.1)), task, tiny_policy), plain)
    assert same(run(small(methods.modomodo(beta=0.1)), task, tiny_policy), plain)


def test_dump_goes_where_something_is_left_to_learn() -> None:
    def reward(completion: str, prompt: Prompt) -> float:
        return letters(completion, prompt) if prompt.meta["domain"] == "hard" else 1.0

    task = levels()
    task.reward = reward_from(reward)
    made = trainer(small(methods.dump(), steps=5), task, tiny_policy())
    made.run()
    sampler = made.source.sampler
    assert isinstance(sampler, UpperConfidence)
    assert sampler.counts["easy"] + sampler.counts["hard"] == 5 * 3 * 4
    assert sum(sampler.recent["easy"]) == 0 < sum(sampler.recent["hard"])
    assert sampler.probabilities()[1] > 0.8
    collected = made.source.collect(5)
    assert collected.metrics["share/hard"] > 0.8
    assert collected.metrics["advantage/hard"] > 0.3


def test_a_stopped_dump_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    method = small(methods.dump())
    whole = run(method, levels(), tiny_policy)
    assert same(stopped_and_resumed(method, levels(), tiny_policy, tmp_path), whole)


def test_curr_reft_takes_each_format_in_its_stage() -> None:
    sums = [TaskItem(f"{i}+1", str(i + 1)) for i in range(6)]
    task = reposed(Task("sums", sums, [], reward_from("exact_match")), options=2)
    seen: list[tuple[str, str]] = []

    def watching(stage: Method) -> Method:
        def sampler(rows, seed):  # type: ignore[no-untyped-def]
            made = stage.sampler(rows, seed)
            take = made.take
            made.take = lambda count: [seen.append((stage.name, rows[i].meta["format"])) or i for i in take(count)]
            return made

        return small(stage, steps=2).replace(sampler=sampler)

    made = Pipeline(tuple(watching(stage) for stage in methods.curr_reft().stages))
    result = train_stage(tiny_policy(), made, task)
    assert result.steps == 8
    for form in ("judge", "choice", "open"):
        assert {kind for name, kind in seen if name == f"curr-reft-{form}"} == {form}
    assert len({kind for name, kind in seen if name == "curr-reft-closing"}) > 1


def test_modomodo_draws_by_its_weights_and_gates_the_reward() -> None:
    task = levels(names=("a", "b", "c"))
    task.reward = Reward({"letters": (letters, 1.0), "never": (Regex("(?!)"), 0.0)})
    method = small(methods.modomodo({"a": 3, "c": 1}, gate="never"))
    assert method.settings.group == 4
    assert methods.modomodo().settings.group == 6
    made = trainer(method, task, tiny_policy())
    groups = [g for step in range(8) for g in made.source.collect(step).groups]
    assert {g.prompt.meta["domain"] for g in groups if g.prompt} == {"a", "c"}
    assert all(t.reward == 0 for g in groups for t in g.trajectories)
