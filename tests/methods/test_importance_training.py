"""MinPRO and MiniRL in the training loop: stale rollouts, engines that differ, experts that are replayed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain import methods
from posttrain.models.causal import CausalPolicy
from posttrain.models.routing import record_experts
from posttrain.objective.batch import Batch
from posttrain.objective.divergence import ReferenceKL
from posttrain.objective.likelihood import Likelihood
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.plain import PlainEngine
from posttrain.rollout.strategies.low_precision import LowPrecision
from posttrain.training.collect import Online
from posttrain.training.loop import Trainer
from posttrain.training.method import Method
from posttrain.training.signals import logp_and_experts, supply
from posttrain.training.stage import source_for
from posttrain.trajectory import PosttrainError
from tiny_models import make_policy, ragged_batch
from tiny_tasks import TOKENIZER, tiny_policy, tiny_task

SHORT: dict[str, Any] = {"steps": 2, "batch": 4, "group": 4, "max_tokens": 6, "warmup": 0.0, "learning_rate": 1e-2}


def trainer(method: Method, policy: CausalPolicy | None = None, **settings: Any) -> Trainer:
    policy = policy or tiny_policy()
    made = method.with_settings(**{**SHORT, **settings})
    return Trainer(policy, made, source_for(policy, made, tiny_task(), seed=0), seed=0)


def stepped(run: Trainer) -> dict[str, float]:
    return run.step(run.source.collect(0))


def weights(run: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in run.policy.model.parameters()]


def test_minpro_trains_on_stale_rollouts() -> None:
    run = trainer(methods.minpro(), minibatches=4, updates=2)
    before = weights(run)
    metrics = stepped(run)
    assert metrics["ratio"] != pytest.approx(1.0, abs=1e-3)
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(run), strict=True))


def test_with_one_update_a_step_the_prefix_does_not_matter() -> None:
    runs = [trainer(methods.minpro(prefix=p), minibatches=1) for p in ("minimum", "product", "geometric")]
    for run in runs:
        run.run()
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights(runs[0]), weights(other), strict=True))


def test_minirl_corrects_what_the_engine_computes_differently() -> None:
    exact, rough = (
        trainer(methods.minirl().replace(rollouts=rollouts), minibatches=1)
        for rollouts in (methods.minirl().rollouts, LowPrecision(3))
    )
    agreed = stepped(exact)
    assert abs(agreed["sampler_kl"]) < 1e-5
    assert agreed["sampler_ess"] == pytest.approx(1, abs=1e-6)
    collected = rough.source.collect(0)
    apart = rough.step(collected)
    assert abs(apart["sampler_kl"]) > 1e-3
    assert apart["sampler_ess"] == pytest.approx(1 / (1 + apart["sampler_chi2"]))
    assert apart["sampler_ess"] < 0.9999
    same = trainer(methods.minirl())
    for group in collected.groups:  # the same completions, as if the engine had agreed
        for t in group.trajectories:
            t.behaviour_logp_full = None
    assert same.step(collected)["grad_norm"] != pytest.approx(apart["grad_norm"], rel=1e-3)


# -- mixtures of experts ---------------------------------------------------------------------------------------------


def mixture(seed: int = 0) -> CausalPolicy:
    return make_policy("mixtral", TOKENIZER, seed, vocab_size=259)


@dataclass
class Pass:
    """A forward pass of a step: what the batch asked to replay, where its tokens went, and whether it learns."""

    asked: list[Tensor] | None
    sent: list[Tensor]
    tokens: list[Tensor]
    learns: bool


def passes(run: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[Pass]:
    """Every forward pass of the policy from now on."""
    log_likelihood, found = run.policy.log_likelihood, []

    def spying(batch: Batch, **options: Any) -> Likelihood:
        answer = log_likelihood(batch, **{**options, "experts": True})
        assert answer.experts is not None
        found.append(Pass(batch.experts, answer.experts, batch.tokens, torch.is_grad_enabled()))
        return answer

    monkeypatch.setattr(run.policy, "log_likelihood", spying)
    return found


def own_choice(policy: CausalPolicy, tokens: Tensor) -> Tensor:
    with torch.no_grad(), record_experts(policy.model) as recorder:
        policy.model(tokens[None, :-1])
    return recorder.take()


def agreement(one: Tensor, other: Tensor) -> float:
    return float((one.sort(-1).values == other.sort(-1).values).float().mean())


FAST: dict[str, Any] = {"minibatches": 4, "learning_rate": 0.1, "token_budget": 60}


def test_r2_replays_what_the_trainer_chose_before_the_first_update(monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(methods.minirl(routing="trainer"), mixture(), **FAST)
    collected = run.source.collect(0)
    assert collected.groups[0].trajectories[0].experts is None
    old = mixture()  # the weights that sampled
    seen = passes(run, monkeypatch)
    run.step(collected)
    before, updates = [p for p in seen if not p.learns], [p for p in seen if p.learns]
    assert len(updates) >= 4
    assert all(p.asked is None for p in before)
    moved = []
    for each in updates:
        assert each.asked is not None
        for asked, sent, tokens in zip(each.asked, each.sent, each.tokens, strict=True):
            assert agreement(asked, sent) == 1
            assert agreement(asked, own_choice(old, tokens)) > 0.99
            moved.append(agreement(asked, own_choice(run.policy, tokens)))
    assert sum(moved) / len(moved) < 0.95  # left alone, the routers would have chosen others


def test_experts_are_recorded_for_the_sequence_they_belong_to() -> None:
    """Micro-batches take sequences in an order of their own."""
    policy, batch = make_policy("mixtral", TOKENIZER), ragged_batch()
    order = torch.cat(batch.partition(12, keep_groups=False))
    assert not torch.equal(order, order.argsort())
    with torch.no_grad():
        logp, experts = logp_and_experts(batch, 12, policy, 1.0)
        torch.testing.assert_close(logp, policy.log_likelihood(batch).logp, rtol=1e-4, atol=1e-4)
    for found, tokens in zip(experts, batch.tokens, strict=True):
        assert agreement(found, own_choice(policy, tokens)[: len(found)]) > 0.99


def test_without_replay_the_routers_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(methods.minirl(), mixture(), **FAST)
    seen = passes(run, monkeypatch)
    run.step(run.source.collect(0))
    assert all(p.asked is None for p in seen)


def test_before_a_single_update_r2_changes_nothing() -> None:
    runs = [trainer(methods.minirl(routing=r), mixture(), minibatches=1) for r in ("none", "trainer")]
    for run in runs:
        run.run()
    assert all(torch.equal(a, b) for a, b in zip(*map(weights, runs), strict=True))


def test_r3_replays_what_the_engine_chose_from_the_old_log_probabilities_on(monkeypatch: pytest.MonkeyPatch) -> None:
    method = methods.minirl(routing="sampler").replace(rollouts=LowPrecision(4))
    run = trainer(method, mixture(), **FAST)
    collected = run.source.collect(0)
    by_tokens = {tuple(t.tokens.tolist()): t.experts for g in collected.groups for t in g.trajectories}
    seen = passes(run, monkeypatch)
    run.step(collected)
    apart = []
    for each in seen:
        assert each.asked is not None
        for asked, sent, tokens in zip(each.asked, each.sent, each.tokens, strict=True):
            assert asked is by_tokens[tuple(tokens.tolist())]
            assert agreement(asked, sent) == 1
            apart.append(agreement(asked, own_choice(mixture(), tokens)))
    assert any(not p.learns for p in seen)
    assert sum(apart) / len(apart) < 0.99  # the rough engine routes some tokens elsewhere


def test_r3_with_an_exact_engine_is_no_replay_on_policy() -> None:
    runs = [trainer(methods.minirl(routing=r), mixture(), minibatches=1, steps=1) for r in ("none", "sampler")]
    first, second = (stepped(run) for run in runs)
    for name in ("loss", "grad_norm", "entropy"):
        assert first[name] == pytest.approx(second[name], rel=1e-4, abs=1e-5)


def test_replay_is_the_policys_alone() -> None:
    """The reference and a teacher choose their own experts."""
    run = trainer(methods.minirl(routing="sampler").replace(divergences=(ReferenceKL(0.1),)), mixture())
    groups = run.source.collect(0).groups
    batch = Batch.of(groups)
    assert batch.experts is not None
    batch.experts = [3 - e for e in batch.experts]  # other ones than it would choose
    needs = frozenset({"old_logp", "reference_logp", "teacher_logp"})
    with torch.no_grad():
        supply(needs, batch, groups, run.policy, run.reference, None, mixture(), temperature=1.0, budget=64)
        free = run.policy.log_likelihood(replace(batch, experts=None)).logp
        forced = run.policy.log_likelihood(batch).logp
    torch.testing.assert_close(batch.reference_logp, free, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch.teacher_logp, free, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch.old_logp, forced, rtol=1e-4, atol=1e-4)
    assert float((free - forced).abs().max()) > 1e-2


def test_engines_and_models_that_cannot_replay_are_refused() -> None:
    policy = mixture()
    method = methods.minirl(routing="sampler").with_settings(**SHORT)
    source = source_for(policy, method, tiny_task(), seed=0)
    assert isinstance(source, Online)
    assert isinstance(source.engine, EmbeddedEngine)
    source.engine = PlainEngine(policy)
    with pytest.raises(PosttrainError, match="PlainEngine does not record"):
        Trainer(policy, method, source)
    dense = trainer(methods.minirl(routing="trainer"), minibatches=2)
    collected = dense.source.collect(0)
    with pytest.raises(PosttrainError, match="no router"):
        dense.step(collected)
