"""A sampler in low precision: what it rounds, whose log-probabilities come with its completions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from posttrain.models.causal import CausalPolicy
from posttrain.objective.batch import Batch
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.plain import PlainEngine
from posttrain.rollout.strategies.low_precision import LowPrecision, round_rows, rounded
from posttrain.rollout.strategy import Plain, Strategy
from posttrain.trajectory import PosttrainError
from tiny_models import make_policy
from tiny_tasks import Scripted, step_context, tiny_policy, tiny_prompts


def test_rounding_by_hand() -> None:
    weight = torch.tensor([[7.0, -3.4, 0.4, 0.6], [0.0, 0.0, 0.0, 0.0], [-0.7, 0.38, 0.04, 0.0]])
    found = round_rows(weight, 4)  # a row's grid: 15 values, its largest value is 7 steps from 0
    assert found[0].tolist() == [7.0, -3.0, 0.0, 1.0]
    assert found[1].tolist() == [0.0] * 4
    torch.testing.assert_close(found[2], torch.tensor([-0.7, 0.4, 0.0, 0.0]))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_row_has_no_more_values_than_its_grid(bits: int) -> None:
    weight = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0))
    found = round_rows(weight, bits)
    assert max(len(row.unique()) for row in found) <= 2**bits - 1
    assert float((found - weight).abs().max()) <= float(weight.abs().max()) / (2 ** (bits - 1) - 1) / 2 + 1e-6
    torch.testing.assert_close(round_rows(found, bits), found)  # what is on the grid stays


def test_the_policy_itself_stays_as_it_is() -> None:
    policy = tiny_policy()
    before = {n: p.clone() for n, p in policy.model.named_parameters()}
    copy = rounded(policy, 4)
    assert all(torch.equal(p, before[n]) for n, p in policy.model.named_parameters())
    changed = {n for n, p in copy.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n, p in before.items() if p.ndim > 1}
    assert not any(p.requires_grad for p in copy.model.parameters())


def drawn(policy: CausalPolicy, strategy: Strategy, **fields: Any) -> Batch:
    return Batch.of(strategy(tiny_prompts(4), step_context(policy, **fields)))


def gap(bits: int) -> float:
    """How far the sampler's log-probabilities are from the policy's on its completions, on average."""
    policy = tiny_policy()
    batch = drawn(policy, LowPrecision(bits))
    with torch.no_grad():
        return float((batch.behaviour_logp_full - policy.log_likelihood(batch).logp).abs().mean())


def test_the_discrepancy_grows_as_bits_fall() -> None:
    found = {bits: gap(bits) for bits in (3, 5, 14)}
    assert found[3] > 2 * found[5] > 4 * found[14]
    assert found[3] > 0.1


def test_log_probabilities_are_those_of_the_rounded_copy() -> None:
    policy = tiny_policy()
    batch = drawn(policy, LowPrecision(3))
    with torch.no_grad():
        theirs = rounded(policy, 3).log_likelihood(batch).logp
        own = policy.log_likelihood(batch).logp
    torch.testing.assert_close(batch.behaviour_logp_full, theirs, rtol=1e-4, atol=1e-4)
    assert float((own - theirs).abs().max()) > 1e-2
    assert bool(batch.reward.isfinite().all())


def test_completions_are_counted_and_fine_rounding_is_the_plain_strategy() -> None:
    policy = tiny_policy()
    context = step_context(policy)
    fine = Batch.of(LowPrecision(16)(tiny_prompts(4), context))
    assert context.sampled == 16
    plain = drawn(policy, Plain())
    assert all(torch.equal(a, b) for a, b in zip(fine.tokens, plain.tokens, strict=True))


def test_the_copy_follows_the_policy() -> None:
    policy = tiny_policy()
    strategy = LowPrecision(8)
    first = drawn(policy, strategy)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(-1)
    second = drawn(policy, strategy)
    assert any(a.tolist() != b.tolist() for a, b in zip(first.tokens, second.tokens, strict=True))


@pytest.mark.parametrize("experts", [True, False])
def test_experts_are_recorded_where_the_runs_own_engine_does(experts: bool, tiny_tokenizer: Any) -> None:
    policy = make_policy("mixtral", tiny_tokenizer, vocab_size=259)
    batch = drawn(policy, LowPrecision(6), engine=EmbeddedEngine(policy, experts=experts))
    assert (batch.experts is not None) == experts


def test_the_plain_engine_is_copied_as_it_is() -> None:
    policy = tiny_policy()
    fast = drawn(policy, LowPrecision(4))
    slow = drawn(policy, LowPrecision(4), engine=PlainEngine(policy))
    assert all(torch.equal(a, b) for a, b in zip(fast.tokens, slow.tokens, strict=True))


def test_senseless_precisions_and_far_engines_are_refused() -> None:
    for bits in (1, 17):
        with pytest.raises(PosttrainError, match="expected 2 to 16"):
            LowPrecision(bits)
    with pytest.raises(PosttrainError, match="Scripted decodes elsewhere"):
        drawn(tiny_policy(), LowPrecision(8), engine=Scripted({}))
