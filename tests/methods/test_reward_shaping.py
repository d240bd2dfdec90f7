"""Trust-GRPO, noisy rewards, RPR and TimeHC-RL: in their limits, against their papers' losses, and in the loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from padded_world import Padded, World, float64  # noqa: F401 (a fixture)
from shaped_world import groups_of, shaped
from test_gradients import by_group, centred, clipped, gradients, k3, loss_of, normalised, token_mean, whiten
from torch import Tensor

from conftest import make_model, make_tokenizer
from posttrain import methods
from posttrain.evaluation.task import Task, TaskItem
from posttrain.methods import Method
from posttrain.models.causal import CausalPolicy
from posttrain.objective.batch import Batch
from posttrain.reward.reward import Reward
from posttrain.training.stage import Trained, train_stage
from posttrain.trajectory import PosttrainError, Prompt

# of the world's 12 sequences, in groups of 4, 3, 2 and 3
OUTCOME = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0]
THINKING = [0.4, 0.7, 0.2, 0.3, 0.9, 0.5, 0.1, 0.2, 0.3, 1.0, 0.6, 0.1]
GAMMA = [math.exp(0.3 - 0.5)] * 4 + [0.0] * 3 + [1.0] * 5  # doubted; all right: dropped; believed; believed
TEXTS = ["wait thus", "hence", "", "so that"] * 3
RPR = [2 / 20, 1 / 20, 0.0, 1 / 20] * 3


def assert_papers(world: World, method: Method, batch: Batch, paper: Tensor) -> None:
    if not method.critic:
        batch.value = None
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
    assert max(float(g.abs().max()) for g in b.values()) > 1e-6
    return all(torch.equal(a[name], b[name]) for name in b)


def with_rewards(world: World, method: Method, rewards: list[float]) -> Batch:
    batch = world.fresh()
    batch.reward = torch.tensor(rewards)
    batch.reference_logp = batch.reference_logp if "reference_logp" in method.objective.needs else None
    return batch


def group_loss(w: Padded, advantage: Tensor, clip: float, beta: float) -> Tensor:
    each = -clipped((w.logp - w.old).exp(), advantage[:, None], clip, clip) + beta * k3(w)
    return w.mean(each).mean()


def critic_loss(w: Padded, reward: Tensor, clip: float, value: float, *, whitened: bool) -> Tensor:
    advantage = reward[:, None] - w.old_value
    used = whiten(w, advantage) if whitened else advantage
    near = w.old_value + (w.value - w.old_value).clamp(-0.2, 0.2)
    squares = torch.max((w.value - reward[:, None]) ** 2, (near - reward[:, None]) ** 2) / 2
    return token_mean(w, -clipped((w.logp - w.old).exp(), used, clip, clip) + value * squares)


# -- Trust-GRPO ------------------------------------------------------------------------------------------------------


@pytest.mark.gradient("trust-grpo")
def test_trust_grpo_equals_the_papers_loss() -> None:
    world = World("prompts", 1)
    method = methods.trust_grpo(clip=0.1, time=30.0)
    batch = shaped(world, method, groups_of(world, TEXTS, OUTCOME, process=THINKING), step=30)
    padded = world.padded()
    reward = torch.tensor(OUTCOME) + torch.tensor(GAMMA) * 0.3 / math.e * torch.tensor(THINKING)
    assert_papers(world, method, batch, group_loss(padded, by_group(padded, reward, normalised), 0.1, 0.04))


@pytest.mark.limit("trust-grpo", "grpo")
def test_without_its_weight_trust_grpo_is_grpo() -> None:
    world = World("prompts")
    method, grpo = methods.trust_grpo(alpha=0.0), methods.grpo(beta=0.04)
    batch = shaped(world, method, groups_of(world, TEXTS, OUTCOME, process=THINKING))
    assert same(gradient(world, method, batch), gradient(world, grpo, with_rewards(world, grpo, OUTCOME)))


def test_arguments_of_trust_grpo() -> None:
    world = World("prompts")

    def rewards(**arguments: Any) -> list[float]:
        groups = groups_of(world, TEXTS, OUTCOME, process=THINKING, other=[1.0] * 12)
        found: list[float] = shaped(world, methods.trust_grpo(**arguments), groups, step=50, total=100).reward.tolist()
        return found

    half = math.exp(-0.5)
    assert rewards()[0] == pytest.approx(1 + GAMMA[0] * 0.3 * half * 0.4)
    assert rewards(anneal=False)[0] == pytest.approx(1 + GAMMA[0] * 0.3 * 0.4)
    assert rewards(trust=False, anneal=False)[0] == pytest.approx(1 + 0.3 * 0.4)
    assert rewards(anneal=False)[4:7] == [1.0] * 3
    assert rewards(anneal=False, drop=False)[4:7] == pytest.approx([1.27, 1.15, 1.03])
    assert rewards(thinking="other", anneal=False)[0] == pytest.approx(1.3)
    assert rewards(thinking=lambda text, prompt: 0.5, anneal=False)[0] == pytest.approx(1.15)


# -- noisy rewards ---------------------------------------------------------------------------------------------------


@pytest.mark.gradient("noisy-rewards")
@pytest.mark.parametrize("whitened", [True, False])
def test_noisy_rewards_equal_the_papers_loss(whitened: bool) -> None:
    world = World("prompts", 1)
    method = methods.noisy_rewards(p=1.0, clip=0.1, value=0.5, whiten=whitened)
    batch = shaped(world, method, groups_of(world, TEXTS, OUTCOME))
    flipped = 1 - torch.tensor(OUTCOME)
    assert_papers(world, method, batch, critic_loss(world.padded(), flipped, 0.1, 0.5, whitened=whitened))


@pytest.mark.limit("noisy-rewards", "ppo")
def test_without_noise_it_is_ppo_on_outcomes() -> None:
    world = World("prompts")
    method = methods.noisy_rewards(p=0.0)
    batch = shaped(world, method, groups_of(world, TEXTS, OUTCOME))
    ppo = methods.ppo(lam=1.0, kl=0.0)
    assert same(gradient(world, method, batch), gradient(world, ppo, with_rewards(world, ppo, OUTCOME)))
    assert (method.critic, method.critic_warmup, method.settings.updates) == (True, 20, 1)


def test_the_signal_under_noise_is_weaker_by_1_minus_2p_on_average() -> None:
    world = World("prompts")
    world.batch.value = torch.full_like(world.batch.token_reward, 0.5)
    noisy = methods.noisy_rewards(p=0.25, whiten=False, value=0.0, clip=1e9)
    clean = methods.noisy_rewards(p=0.0, whiten=False, value=0.0, clip=1e9)
    wanted = gradient(world, clean, shaped(world, clean, groups_of(world, TEXTS, OUTCOME)))
    found = {name: torch.zeros_like(g) for name, g in wanted.items()}
    for seed in range(200):
        batch = shaped(world, noisy, groups_of(world, TEXTS, OUTCOME), seed=seed)
        for name, each in gradient(world, noisy, batch).items():
            found[name] += each / 200
    slope = float((found["head"] * wanted["head"]).sum() / wanted["head"].square().sum())
    assert slope == pytest.approx(1 - 2 * 0.25, abs=0.1)


@pytest.mark.limit("noisy-rewards", "grpo")
def test_flipping_every_prompt_turns_grpo_around() -> None:
    world = World("prompts", length=3)
    world.batch.old_logp = None  # the clip is not symmetric
    method, grpo = methods.noisy_rewards(p=1.0, critic=False), methods.grpo()
    batch = shaped(world, method, groups_of(world, TEXTS, OUTCOME))
    found, wanted = gradient(world, method, batch), gradient(world, grpo, with_rewards(world, grpo, OUTCOME))
    for name, each in wanted.items():
        torch.testing.assert_close(found[name], -each, rtol=1e-9, atol=1e-12)


# -- RPR -------------------------------------------------------------------------------------------------------------


@pytest.mark.gradient("rpr")
@pytest.mark.parametrize("use", ["calibrate", "only"])
def test_rpr_equals_the_papers_loss(use: Any) -> None:
    world = World("prompts", 1)
    scores = [0.45, 0.55, 0.1, 0.5, 0.49, 0.9, 0.0, 1.0, 0.2, 0.3, 0.4, 0.6]
    method = methods.rpr(use, clip=0.1, answer="none")
    batch = shaped(world, method, groups_of(world, TEXTS, scores))
    lifted = [s + 0.1 * p if s < 0.5 else s for s, p in zip(scores, RPR, strict=True)]
    reward = torch.tensor(lifted if use == "calibrate" else RPR)
    assert_papers(world, method, batch, critic_loss(world.padded(), reward, 0.1, 0.1, whitened=True))


@pytest.mark.limit("rpr", "noisy-rewards")
def test_without_its_weight_calibration_changes_nothing() -> None:
    world = World("prompts")
    method, clean = methods.rpr(alpha=0.0), methods.noisy_rewards(p=0.0)
    batch = shaped(world, method, groups_of(world, TEXTS, OUTCOME))
    assert same(gradient(world, method, batch), gradient(world, clean, with_rewards(world, clean, OUTCOME)))


def test_rpr_may_come_before_the_outcome() -> None:
    world = World("prompts")
    method = methods.rpr("switch", switch=0.3, answer="none")
    for step, wanted in ((29, RPR), (30, OUTCOME)):
        batch = shaped(world, method, groups_of(world, TEXTS, OUTCOME), step=step, total=100)
        assert batch.reward.tolist() == pytest.approx(wanted)
    own = methods.rpr("only", phrases=("thus", "wait"), answer="none")
    assert shaped(world, own, groups_of(world, TEXTS, OUTCOME)).reward[:4].tolist() == [0.1, 0, 0, 0]
    assert not shaped(world, methods.rpr("only"), groups_of(world, TEXTS, OUTCOME)).reward.any()  # no marked answer
    with pytest.raises(PosttrainError, match="expected calibrate, only or switch"):
        methods.rpr("always")  # type: ignore[arg-type]


# -- TimeHC-RL -------------------------------------------------------------------------------------------------------

ANSWERS = ["<answer>a</answer>", "a", "<think>t</think><answer>a</answer>", "<answer>a</answer>"] * 3
TWIN = [0.5] * 4 + [0.0] * 3 + [0.6] * 2 + [0.4] * 3  # p = 1/2, 1, 1/2 and 1/3


def by_hand() -> Tensor:
    """Rewards 3 or -0.5 formed and 1 or -2.5 malformed, with 0.4 more where p > 0.9 of the twin's."""
    right, formed = torch.tensor(OUTCOME), torch.tensor([float("<" in a) for a in ANSWERS])
    earned = torch.tensor([1.0] * 4 + [1.0] * 3 + [0.0] * 2 + [0.0] * 3)
    return torch.where(right > 0, 2.0, -1.5) + torch.where(formed > 0, 1.0, -1.0) + 0.4 * earned * right


@pytest.mark.gradient("timehc-rl")
@pytest.mark.parametrize("scale", ["group", "none"])
def test_timehc_rl_equals_the_papers_loss(scale: Any) -> None:
    world = World("prompts", 1)
    method = methods.timehc_rl(scale=scale, clip=0.1, beta=0.3)
    groups = groups_of(world, ANSWERS, OUTCOME, right=OUTCOME, twin_accuracy=TWIN)
    batch = shaped(world, method, groups)
    assert batch.reward.tolist() == pytest.approx(by_hand().tolist())
    padded = world.padded()
    advantage = by_group(padded, by_hand(), normalised if scale == "group" else centred)
    assert_papers(world, method, batch, group_loss(padded, advantage, 0.1, 0.3))


@pytest.mark.limit("timehc-rl", "grpo")
def test_without_a_bonus_and_with_one_form_timehc_rl_is_grpo() -> None:
    world = World("prompts")
    method, grpo = methods.timehc_rl(bonus=0.0, format=".*"), methods.grpo(beta=0.001)
    groups = groups_of(world, ANSWERS, OUTCOME, right=OUTCOME, twin_accuracy=TWIN)
    signed = [3.0 if r else -0.5 for r in OUTCOME]
    assert same(
        gradient(world, method, shaped(world, method, groups)), gradient(world, grpo, with_rewards(world, grpo, signed))
    )


@pytest.mark.limit("timehc-rl")
def test_with_one_form_the_deviation_takes_the_bonus_away() -> None:
    world = World("prompts")
    advantages = []
    for bonus in (0.0, 0.4):
        method = methods.timehc_rl(bonus=bonus, format=".*")
        groups = groups_of(world, ANSWERS, OUTCOME, right=OUTCOME, twin_accuracy=[0.0] * 12)
        batch = shaped(world, method, groups)
        method.objective.prepare(batch)
        assert batch.advantage is not None
        advantages.append(batch.advantage)
    torch.testing.assert_close(*advantages, rtol=1e-4, atol=1e-4)
    all_right = batch.group == 1
    assert not advantages[1][batch.spread(all_right)].any()  # a constant bonus


# -- in the loop -----------------------------------------------------------------------------------------------------


def letters(completion: str, prompt: Prompt) -> float:
    return sum(c.isalpha() for c in completion) / (1 + len(completion))


def right(completion: str, prompt: Prompt) -> float:
    return float(letters(completion, prompt) > 0.2)


def trained(method: Method, steps: int = 2) -> tuple[Trained, bool]:
    torch.set_default_dtype(torch.float32)
    policy = CausalPolicy(make_model(), make_tokenizer(), "tiny")
    items = [TaskItem(f"x{i}\ny{i}\nwhere?") for i in range(6)]
    task = Task("letters", items, [], Reward({"right": (right, 1.0), "process": (letters, 0.0)}))
    before = [p.detach().clone() for p in policy.model.parameters()]
    method = method.with_settings(steps=steps, batch=4, group=6, max_tokens=6, warmup=0.0, learning_rate=1e-3)
    result = train_stage(policy, method, task)
    return result, any(not torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("method", "metrics"),
    [
        (methods.trust_grpo(), ("trust", "thinking", "thinking_margin", "thinking_weight")),
        (methods.noisy_rewards(critic_warmup=1), ("clean_reward", "flipped")),
        (methods.noisy_rewards(critic=False), ("clean_reward", "flipped")),
        (methods.rpr(critic_warmup=0), ("pattern", "lifted")),
        (methods.timehc_rl(), ("twin_accuracy", "twin_gap", "contrast", "well_formed")),
    ],
    ids=["trust-grpo", "noisy-ppo", "noisy-grpo", "rpr", "timehc-rl"],
)
def test_steps_in_the_loop(method: Method, metrics: tuple[str, ...]) -> None:
    result, moved = trained(method)
    assert moved
    assert set(metrics) <= set(result.metrics[0])
    twins = 2 if method.name == "timehc-rl" else 1
    assert result.rollouts == twins * 2 * 4 * 6


def test_the_critic_warms_up_alone() -> None:
    _, moved = trained(methods.noisy_rewards(critic_warmup=2))
    assert not moved
