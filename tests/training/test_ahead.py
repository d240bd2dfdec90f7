"""Rollouts ahead of their step: exactly as old as they are said to be, corrected for it, and kept in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain import methods
from posttrain.models.causal import CausalPolicy
from posttrain.objective.denominator import ClippedWeight, CurrentPolicy, OldPolicy, OldPolicySequence, One
from posttrain.objective.off_policy import BySource
from posttrain.objective.sampler_ratio import SamplerCorrected
from posttrain.rollout.engine_choice import engine_for
from posttrain.rollout.rollout import rollout
from posttrain.training.ahead import Ahead, corrects
from posttrain.training.collect import MAX_ROUNDS, Online
from posttrain.training.loop import Trainer
from posttrain.training.method import Method
from posttrain.trajectory import Group, PosttrainError
from tiny_training import demonstrations, make_policy, offline, online, same, weights

SETTINGS: dict[str, Any] = {"steps": 5, "batch": 3, "group": 4, "max_tokens": 6, "learning_rate": 1e-2, "warmup": 0.0}


def grpo(**settings: Any) -> Method:
    return methods.grpo().with_settings(**{**SETTINGS, **settings})


def source(trainer: Trainer) -> Online:
    assert isinstance(trainer.source, Online)
    return trainer.source


def taken(trainer: Trainer, steps: int) -> tuple[list[list[Group]], list[dict[str, torch.Tensor]]]:
    """The groups of each step, and the weights before each step."""
    groups, before = [], []
    for step in range(steps):
        before.append(weights(trainer.policy))
        collected = source(trainer).collect(step)
        groups.append(collected.groups)
        trainer.step(collected)
        trainer.progress.step += 1
    return groups, before


@torch.no_grad()
def with_weights(kept: dict[str, torch.Tensor]) -> CausalPolicy:
    policy = make_policy()
    for name, parameter in policy.model.named_parameters():
        parameter.copy_(kept[name])
    return policy


@pytest.mark.parametrize("staleness", [1, 2])
def test_a_step_is_drawn_by_the_weights_of_so_many_updates_before(staleness: int) -> None:
    trainer = online(grpo(staleness=staleness))
    groups, before = taken(trainer, 5)
    order = online(grpo()).source.sampler.take(15)
    for step, found in enumerate(groups):
        assert [g.prompt.key for g in found if g.prompt] == order[3 * step : 3 * step + 3], "no prompt is skipped"
        policy = with_weights(before[max(0, step - staleness)])
        prompts = [g.prompt for g in found if g.prompt]
        expected = rollout(engine_for(policy), prompts, 4, trainer.settings.sampling, step * MAX_ROUNDS)
        for one, other in zip(found, expected, strict=True):
            for a, b in zip(one.trajectories, other.trajectories, strict=True):
                assert torch.equal(a.tokens, b.tokens)
                assert torch.equal(a.behaviour_logp_full, b.behaviour_logp_full)  # type: ignore[arg-type]
    assert not same(before[0], before[1])


def test_old_probabilities_are_the_samplers() -> None:
    """The ratio of a stale step is that of the policy to the one that drew its completions."""
    trainer = online(grpo(staleness=1))
    for step in range(3):
        collected = source(trainer).collect(step)
        assert collected.metrics["staleness"] == min(step, 1)
        metrics = trainer.step(collected)
        trainer.progress.step += 1
        assert metrics["engine_kl"] == 0, "the old policy is the one that sampled"
        if step == 0:
            assert metrics["ratio"] == pytest.approx(1, abs=1e-5)
        else:
            assert abs(metrics["ratio"] - 1) > 1e-4
            assert abs(metrics["sampler_kl"]) > 1e-4


def test_without_updates_it_is_training_as_ever() -> None:
    """At a learning rate of 0 older weights are the present ones: the same completions, losses, gradients."""
    found = [online(grpo(staleness=s, learning_rate=0.0, updates=2)) for s in (0, 2)]
    for step in range(4):
        one, other = (source(trainer).collect(step) for trainer in found)
        for a, b in zip(one.groups, other.groups, strict=True):
            assert [t.text for t in a.trajectories] == [t.text for t in b.trajectories]
            assert a.rewards.tolist() == b.rewards.tolist()
        assert one.rollouts == other.rollouts
        fresh, stale = found[0].step(one), found[1].step(other)
        for name in ("loss", "grad_norm", "ratio", "entropy"):
            assert stale[name] == pytest.approx(fresh[name], rel=1e-4, abs=1e-6), name


def test_refused_groups_are_drawn_again_with_present_weights() -> None:
    method = grpo(staleness=1).replace(sampler=methods.dapo().sampler)
    trainer = online(method, reward=lambda c, p: len(c) * (p.key % 2), sampler=method.sampler(range(8), 0))
    groups, _ = taken(trainer, 3)
    assert all(g.prompt is not None and g.prompt.key % 2 for found in groups for g in found)


def test_nothing_is_drawn_beyond_the_last_step() -> None:
    trainer = online(grpo(staleness=3, steps=2))
    trainer.run()
    assert not source(trainer).ahead.waiting
    assert source(trainer).sampler.state_dict()["taken"] == 6


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_ends_in_the_same_weights(tmp_path: Path, stop: int) -> None:
    """What was drawn ahead is part of the checkpoint: the weights that drew it are gone."""
    settings = {"staleness": 2, "checkpoint_every": 1}
    whole = online(grpo(**settings), folder=tmp_path / "whole")
    whole.run()
    first = online(grpo(**settings), folder=tmp_path / "cut", stop=lambda: first.progress.step >= stop)
    assert first.run().status == "interrupted"
    waiting = source(first).ahead.waiting
    assert [drawn.step for drawn in waiting] == [step for step in range(stop, stop + 2) if step < 5]
    again = online(grpo(**settings), folder=tmp_path / "cut")
    assert again.run().progress.step == 5
    assert same(weights(again.policy), weights(whole.policy))
    fresh = online(grpo(), folder=tmp_path / "fresh")
    fresh.run()
    assert not same(weights(fresh.policy), weights(whole.policy)), "staleness makes a difference here"


class Slow:
    """An engine that begins rollouts and has them done when they are asked for: it says in which order it was used."""

    def __init__(self, policy: CausalPolicy) -> None:
        self.engine, self.log = engine_for(policy), list[str]()

    def begin(self, prompts: Any, samples: int, sampling: Any, seed: int, environment: Any = None) -> Any:
        number = seed // MAX_ROUNDS
        self.log.append(f"begin {number}")
        groups = rollout(self.engine, prompts, samples, sampling, seed, environment)
        log = self.log

        class Underway:
            def groups(self, progress: Any = None) -> list[Group]:
                log.append(f"wait {number}")
                return groups

        return Underway()

    def generate(self, *given: Any) -> Any:
        raise AssertionError("whole rollouts are begun")


def test_the_next_rollouts_are_begun_before_this_step_is_waited_for() -> None:
    """And they are those of an engine that cannot begin them."""
    policy = make_policy()
    trainer = online(grpo(staleness=1), policy)
    engine = Slow(policy)
    source(trainer).engine = engine
    trainer.run()
    expected = ["begin 0", "begin 1", "wait 0"]
    expected += [entry for step in (1, 2, 3) for entry in (f"begin {step + 1}", f"wait {step}")] + ["wait 4"]
    assert engine.log == expected
    plain = online(grpo(staleness=1))
    plain.run()
    assert same(weights(policy), weights(plain.policy))


@pytest.mark.parametrize(
    ("denominator", "corrected"),
    [
        (OldPolicy(), True),
        (OldPolicySequence(), True),
        (ClippedWeight(), True),
        (SamplerCorrected(), True),
        (BySource(), True),
        (CurrentPolicy(), False),
        (One(), False),
    ],
)
def test_which_denominators_correct(denominator: Any, corrected: bool) -> None:
    assert corrects(methods.grpo().replace(denominator=denominator).objective) is corrected


def test_of_a_mixture_the_policys_own_term_counts() -> None:
    assert corrects(methods.chord().objective)


def test_refusals() -> None:
    with pytest.raises(PosttrainError, match=r"reinforce: staleness is 1; its objective weighs a completion alike"):
        online(methods.reinforce().with_settings(**SETTINGS, staleness=1))
    with pytest.raises(PosttrainError, match=r"staleness is 1; Shared looks at the present policy"):
        online(methods.sapo(1, 1).with_settings(**SETTINGS, staleness=1))
    with pytest.raises(PosttrainError, match=r"sft: staleness is 1; rows of a data set are not drawn ahead"):
        offline(methods.sft().with_settings(steps=1, staleness=1), demonstrations())
    with pytest.raises(PosttrainError, match="staleness is -1; expected at least 0"):
        grpo(staleness=-1)


def test_an_empty_queue_has_an_empty_state() -> None:
    ahead = Ahead([], 2)
    assert ahead.state() == ([], {})
    ahead.restore([], {"weight/x": torch.zeros(1)})
    assert not ahead.waiting
