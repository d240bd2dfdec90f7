"""Methods with demonstrations or a teacher in the real loop: a step or two of a tiny model."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from conftest import make_model, make_tokenizer
from posttrain import methods
from posttrain.data.templates import render_completion, render_prompt
from posttrain.models.causal import CausalPolicy
from posttrain.reward.reward import Reward
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.training.collect import Online
from posttrain.training.loop import Trainer
from posttrain.training.method import Method
from posttrain.training.scoring import sequence_scores
from posttrain.trajectory import Group, PosttrainError, Prompt, Trajectory

TOKENIZER = make_tokenizer()
ROWS = 4


def policy(seed: int = 0) -> CausalPolicy:
    return CausalPolicy(make_model(seed), TOKENIZER, "tiny")


def row(i: int) -> Prompt:
    made = render_prompt(TOKENIZER, f"p{i}", chat=False)
    tokens, mask = render_completion(TOKENIZER, f"p{i}", "yes", chat=False)
    made.key, made.demonstration = i, Trajectory(tokens, mask, source="expert", finish="stop", text="yes")
    return made


def score(text: str, prompt: Prompt) -> float:
    """The demonstration, "yes", is right; of the completions of an untrained model one in twelve or so is."""
    return float(text == "yes" or zlib.crc32(text.encode()) % 12 == 0)


def strict(text: str, prompt: Prompt) -> float:
    return float(text == "yes")


def trainer(method: Method, *, reward: Callable[[str, Prompt], float] = score, **options: Any) -> Trainer:
    settings = {"steps": 2, "batch": ROWS, "max_tokens": 6, "learning_rate": 1e-2, "group": 4}
    made = method.with_settings(**{**settings, **options})
    own, prompts = policy(), [row(i) for i in range(8)]
    source = Online(
        prompts, made.sampler(prompts, 0), made.settings, EmbeddedEngine(own), Reward({"score": (reward, 1.0)}), 0
    )
    return Trainer(own, made, source, seed=0)


def likelihood(of: CausalPolicy) -> float:
    """Mean log-probability of the demonstrations' tokens."""
    shown = [demonstration for i in range(8) if (demonstration := row(i).demonstration) is not None]
    return sum(sequence_scores(of, shown)) / len(shown)


IMITATING = ["chord", "chord-phi", "visurf", "ahpo", "hpt", "luffy", "srft"]


# SRFT hardly imitates what an untrained policy is uncertain about
@pytest.mark.parametrize("name", [name for name in IMITATING if name != "srft"])
def test_a_run_learns_from_the_demonstrations(name: str) -> None:
    made = trainer(methods.find(name).function(), reward=strict)
    before = likelihood(made.policy)
    assert made.run().status == "finished"
    assert likelihood(made.policy) > before + 0.05


@pytest.mark.parametrize("name", IMITATING)
def test_several_updates_on_the_same_rollouts_are_finite(name: str) -> None:
    made = trainer(methods.find(name).function(), updates=2, minibatches=2, token_budget=32)
    made.run()
    assert made.progress.skipped == 0
    assert all(bool(torch.isfinite(p).all()) for p in made.policy.model.parameters())


def step(method: Method, **options: Any) -> tuple[dict[str, float], list[Group]]:
    made = trainer(method, **options)
    collected = made.source.collect(0)
    return made.step(collected), collected.groups


def test_chord_divides_the_prompts_of_a_step() -> None:
    metrics, groups = step(methods.chord())
    assert [t.source for g in groups for t in g.trajectories] == ["policy"] * 8 + ["expert"] * 2
    assert {"expert_logp", "logp", "clip_fraction"} <= metrics.keys()
    undecided = [len({t.reward for t in g.trajectories}) > 1 for g in groups[:2]]
    assert metrics["undecided"] == sum(undecided) / 2  # of the prompts that were tried


def test_hpt_logs_the_share_of_demonstrated_prompts_and_the_reward_of_all_rollouts() -> None:
    metrics, groups = step(methods.hpt())
    gated = [g for g in groups if g.trajectories[0].source == "expert"]
    assert 0 < len(gated) < ROWS  # some of both, or the test shows nothing
    assert metrics["gated"] == len(gated) / ROWS
    kept = [t.reward for g in groups for t in g.trajectories if t.source == "policy"]
    assert metrics["reward"] == pytest.approx(sum(kept) / (4 * ROWS))  # the dropped ones earned nothing


def test_hpt_skips_an_update_with_a_very_large_gradient() -> None:
    assert methods.hpt().settings.skip_grad_norm == 80
    made = trainer(methods.hpt(), skip_grad_norm=1e-3, max_skipped=3)
    weights = [p.detach().clone() for p in made.policy.model.parameters()]
    made.run()
    assert made.progress.skipped == 2
    assert all(torch.equal(a, b) for a, b in zip(weights, made.policy.model.parameters(), strict=True))
    refused = trainer(methods.hpt(), skip_grad_norm=1e-3, max_skipped=2)
    with pytest.raises(PosttrainError, match=r"2 updates in a row were too large \(last: gradient norm is"):
        refused.run()


def test_visurf_logs_how_often_the_label_is_matched() -> None:
    metrics, groups = step(methods.visurf())
    assert 0 < metrics["label_matched"] < 1
    matched = [any(t.reward == 1 for t in g.trajectories[:-1]) for g in groups]
    assert metrics["label_matched"] == sum(matched) / ROWS


@pytest.mark.parametrize("where", ["all", "failed", "unsolved"])
def test_kdrl_follows_its_teacher(where: str) -> None:
    teacher = policy(seed=1)
    made = trainer(methods.kdrl(teacher, beta=10.0, slope=0.0, where=where))  # type: ignore[arg-type]
    made.policy.model.load_state_dict(teacher.model.state_dict())
    first = made.step(made.source.collect(0))
    assert first["teacher_kl"] == pytest.approx(0, abs=1e-5)
    assert first["teacher_divergence"] == pytest.approx(0, abs=1e-8)


def test_on_policy_distillation_comes_closer_to_the_teacher() -> None:
    made = trainer(methods.kd_rkl(policy(seed=1)), batch=8, learning_rate=3e-3, steps=12)
    first, last = [made.step(made.source.collect(i)) for i in range(12)][::11]
    assert last["teacher_kl"] < 0.8 * first["teacher_kl"]


@pytest.mark.parametrize("method", [methods.kdrl(), methods.kd_rkl()])
def test_a_missing_teacher_is_said(method: Method) -> None:
    with pytest.raises(PosttrainError, match="give it one: teacher="):
        trainer(method).run()


def test_raft_imitates_what_was_right() -> None:
    made = trainer(methods.raft())
    collected = made.source.collect(0)
    right = [t for g in collected.groups for t in g.trajectories if t.reward == 1]
    assert 0 < len(right) < 4 * ROWS
    before = sum(sequence_scores(made.policy, right))
    made.step(collected)
    assert sum(sequence_scores(made.policy, right)) > before
