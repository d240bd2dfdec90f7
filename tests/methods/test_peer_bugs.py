"""Faults that users of other trainers met: each must be impossible here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conftest import make_model, make_tokenizer
from posttrain import methods
from posttrain.data.sampler import Shuffled
from posttrain.methods import Method
from posttrain.models.causal import CausalPolicy
from posttrain.objective.batch import Batch
from posttrain.objective.estimator import Objective
from posttrain.objective.likelihood import Likelihood
from posttrain.training.collect import Collected, Offline
from posttrain.training.loop import Trainer
from posttrain.trajectory import Group, PosttrainError, Trajectory

END = 2  # the end token, which is the pad token too


def sequence(actions: int, seed: int, **parts: object) -> Trajectory:
    """Three tokens of prompt that depend on the seed alone, then a completion that ends with the end token."""
    words = torch.randint(3, 259, (3 + actions,), generator=torch.Generator().manual_seed(seed))
    words[-1] = END
    return Trajectory(words, torch.arange(3 + actions) >= 3, **parts)  # type: ignore[arg-type]


@pytest.fixture
def policy() -> CausalPolicy:
    return CausalPolicy(make_model(0), make_tokenizer())


# -- a sequence ratio that was summed over tokens in the place of their mean ------------------------------------------


def test_a_long_completion_is_not_clipped_for_its_length(policy: CausalPolicy) -> None:
    # every token drifts by as little: the ratio of a completion is that of its tokens, however many there are
    batch = Batch.of([Group([sequence(2, 1, reward=1.0), sequence(60, 2, reward=0.0)])])
    logp = policy.log_likelihood(batch).logp
    batch.old_logp = logp.detach() - 2e-4
    method = methods.gspo()
    method.objective.advantage.prepare(batch)
    loss = method.objective(batch, Likelihood(logp), batch.totals)
    assert loss.metrics["clip_fraction"] == (0.0, 62)
    assert loss.metrics["ratio"][0] / 62 == pytest.approx(math.exp(2e-4), abs=1e-6)
    summed = batch.sum(logp.detach() - batch.old_logp).exp()
    assert summed[1] > 1 + 4e-4 * 10  # what a sum would have been


# -- a fused kernel that ignored the importance ratio -----------------------------------------------------------------

RATIO_METHODS: dict[str, Callable[[], Method]] = {
    "ppo": lambda: methods.ppo(clip=0.9, kl=0.0).replace(advantage=methods.reinforce().objective.advantage),
    "grpo": lambda: methods.grpo(clip=0.9),
    "dr-grpo": lambda: methods.dr_grpo(clip=0.9),
    "dapo": lambda: methods.dapo(0.9, 0.9),
    "gspo": lambda: methods.gspo(0.9, 0.9),
    "cispo": lambda: methods.cispo(),
    "rloo": lambda: methods.rloo(clip=0.9),
    "reinforce++": lambda: methods.reinforce_plus_plus(clip=0.9, kl=0.0),
    "gdpo": lambda: methods.gdpo(clip=0.9),
    "riskpo": lambda: methods.riskpo(clip=0.9),
    "minpro": lambda: methods.minpro(high=0.9),
    "minirl": lambda: methods.minirl(high=0.9),
}


@pytest.mark.parametrize("name", RATIO_METHODS)
def test_the_importance_ratio_reaches_the_gradient_through_the_fused_operator(name: str, policy: CausalPolicy) -> None:
    # completions of one token, all 1.5 times as likely as when they were sampled: every gradient is 1.5 times as large
    batch = Batch.of([Group([sequence(1, 1, reward=1.0), sequence(1, 2, reward=0.0), sequence(1, 3, reward=0.5)])])
    objective = RATIO_METHODS[name]().objective.replace(divergences=())
    objective.advantage.prepare(batch)

    def gradient(shift: float) -> Tensor:
        policy.model.zero_grad()
        likelihood = policy.log_likelihood(batch)
        batch.old_logp = likelihood.logp.detach() - shift
        objective(batch, likelihood, batch.totals).surrogate.backward()
        return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])

    plain, weighted = gradient(0.0), gradient(math.log(1.5))
    assert plain.norm() > 1e-3
    torch.testing.assert_close(weighted, 1.5 * plain, rtol=1e-4, atol=1e-6)


def test_every_method_with_a_ratio_is_among_them() -> None:
    from posttrain.objective.denominator import CurrentPolicy, One

    base = {e.function.__module__ for e in map(methods.find, RATIO_METHODS)} | {methods.find("sft").function.__module__}
    found = {n: e.function() for n, e in methods.registered().items() if e.function.__module__ in base}
    online = {n: m for n, m in found.items() if isinstance(m, Method)}
    assert RATIO_METHODS.keys() == {
        n
        for n, m in online.items()
        if isinstance(m.objective, Objective) and not isinstance(m.objective.denominator, CurrentPolicy | One)
    }


# -- the end token, lost where the pad token equals it ----------------------------------------------------------------


def test_the_end_token_is_learned_although_pad_equals_it(policy: CausalPolicy) -> None:
    rows = [sequence(4, 1), sequence(1, 2), sequence(7, 3)]
    rows[2].tokens[5] = END  # one more in the middle of an answer, as between turns
    batch = Batch.of([Group([row]) for row in rows])
    assert int((batch.target == END).sum()) == 4
    assert batch.totals.tokens == 12
    method = methods.sft()
    method.objective.advantage.prepare(batch)
    for packs in (True, False):  # packed rows, and padded ones for models that cannot be packed
        policy._packs = packs
        logp = policy.log_likelihood(batch).logp
        alone = []
        for row in rows:
            logits = policy.model(row.tokens[None]).logits[0].log_softmax(-1)
            own = logits[:-1].gather(1, row.tokens[1:, None])[:, 0]
            alone.append(own[row.action_mask[1:]])
        torch.testing.assert_close(logp, torch.cat(alone), rtol=1e-5, atol=1e-5)
        policy.model.zero_grad()
        method.objective(batch, Likelihood(logp), batch.totals).surrogate.backward()
        before = logp.detach()[batch.target == END]
        with torch.no_grad():
            for p in policy.model.parameters():
                assert p.grad is not None
                p -= 0.05 * p.grad
        assert bool((policy.log_likelihood(batch).logp[batch.target == END] > before).all())


# -- NaN log-probabilities --------------------------------------------------------------------------------------------

ROWS = [Group([sequence(n, n)]) for n in (9, 8, 7, 6)]


class Poisoned(CausalPolicy):
    """A policy whose n-th answer (from 0) is spoiled: NaN in one token, or a gradient that is not finite."""

    spoil: frozenset[int] = frozenset()
    kind = "logp"
    answers = 0

    def log_likelihood(self, batch: Batch, **options: object) -> Likelihood:
        found = super().log_likelihood(batch, **options)  # type: ignore[arg-type]
        if self.answers in self.spoil:
            if self.kind == "logp":
                where = torch.arange(len(found.logp)) == 1
                found = replace(found, logp=torch.where(where, found.logp * float("nan"), found.logp))
            else:  # 0 * sqrt(0): the value is 0, its derivative 0 * inf
                found = replace(found, logp=found.logp + 0 * (found.logp - found.logp.detach()).sqrt())
        self.answers += 1
        return found


def trainer(**settings: object) -> tuple[Trainer, Poisoned]:
    """SFT on four rows, a micro-batch for each."""
    torch.manual_seed(0)
    policy = Poisoned(make_model(0), make_tokenizer())
    assert policy.packs
    method = methods.sft().with_settings(batch=4, token_budget=12, steps=3, learning_rate=0.01, **settings)
    return Trainer(policy, method, Offline(ROWS, Shuffled(ROWS), method.settings)), policy


def state(of: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in of.optimizer.tensors().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("kind", ["logp", "gradient"])
@pytest.mark.parametrize("at", [0, 1, 3], ids=["first", "middle", "last"])
def test_a_nan_in_one_micro_batch_skips_and_counts_the_update(at: int, kind: str) -> None:
    run, policy = trainer()
    run.step(Collected(ROWS))
    assert policy.answers == 4
    before, weights = state(run), {n: p.detach().clone() for n, p in policy.model.named_parameters()}
    policy.answers, policy.spoil, policy.kind = 0, frozenset({at}), kind
    metrics = run.step(Collected(ROWS))
    assert (run.progress.skipped, run.progress.skipped_in_a_row, metrics["skipped"]) == (1, 1, 1)
    assert same(state(run), before)
    assert all(torch.equal(p, weights[n]) for n, p in policy.model.named_parameters())
    assert all(p.grad is None for p in policy.model.parameters())
    # the next update is the one that would have been without it, bit for bit
    policy.spoil = frozenset()
    run.step(Collected(ROWS))
    assert run.progress.skipped_in_a_row == 0
    clean, _ = trainer()
    for _ in range(2):
        clean.step(Collected(ROWS))
    assert same(state(run), state(clean))
    assert not same(state(run), before)


def test_a_nan_in_a_masked_token_poisons_nothing_either(policy: CausalPolicy) -> None:
    # the completion that was cut off carries no loss, but its NaN would reach the weights through 0 * NaN
    spoiled = Poisoned(make_model(0), make_tokenizer())
    method = methods.dapo().with_settings(batch=1, steps=1, learning_rate=0.01)
    group = Group([sequence(4, 1, reward=1.0, finish="length"), sequence(4, 2, reward=0.0)])
    run = Trainer(spoiled, method, Offline([group], Shuffled(range(1)), method.settings))
    spoiled.spoil = frozenset({0})
    weights = {n: p.detach().clone() for n, p in spoiled.model.named_parameters()}
    metrics = run.step(Collected([group]))
    assert metrics["skipped"] == 1
    assert all(torch.equal(p, weights[n]) for n, p in spoiled.model.named_parameters())


def test_an_unscored_completion_skips_the_update_too() -> None:
    method = methods.grpo().with_settings(batch=1, steps=1)
    group = Group([sequence(4, 1, reward=1.0), sequence(4, 2)])  # its reward is NaN until something scored it
    policy = CausalPolicy(make_model(0), make_tokenizer())
    run = Trainer(policy, method, Offline([group], Shuffled(range(1)), method.settings))
    before = state(run)
    assert run.step(Collected([group]))["skipped"] == 1
    assert same(state(run), before)


def test_updates_that_are_never_finite_end_the_run_with_a_reason() -> None:
    run, policy = trainer(max_skipped=2)
    policy.spoil = frozenset(range(100))
    run.step(Collected(ROWS))
    with pytest.raises(PosttrainError, match="2 updates in a row were not finite"):
        run.step(Collected(ROWS))
