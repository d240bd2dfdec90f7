"""Signals: per-token arrays that do not depend on micro-batches, and answers put behind other rows' prompts."""

from __future__ import annotations

import pytest
import torch

from posttrain.models.adapters import add_lora
from posttrain.objective.batch import Batch
from posttrain.training.critic import ValueHead
from posttrain.training.signals import Reference, mismatched, per_token, supply
from posttrain.trajectory import Group, PosttrainError, Trajectory
from tiny_training import demonstrations, feedback, make_policy, pairs


@pytest.mark.parametrize("budget", [1, 50, 1 << 20])
def test_per_token_is_in_the_order_of_the_batch(budget: int) -> None:
    policy = make_policy()
    batch = Batch.of(demonstrations(7))
    found = per_token(batch, budget, lambda part: policy.log_likelihood(part).logp)
    assert not found.requires_grad
    start = 0
    for group in demonstrations(7):
        t = group.trajectories[0]
        logits = policy.model(t.tokens[None]).logits[0, :-1].log_softmax(-1)
        own = logits.gather(1, t.tokens[1:, None])[:, 0][t.action_mask[1:]].detach()
        torch.testing.assert_close(found[start : start + len(own)], own, rtol=1e-5, atol=1e-5)
        start += len(own)
    assert start == len(found)


def test_answers_are_put_behind_other_prompts() -> None:
    rows = feedback(4)
    batch = mismatched(rows, limit=1000)
    for i, group in enumerate(rows):
        mine, other = group.trajectories[0], rows[(i + 1) % 4].trajectories[0]
        prompt, answer = mine.tokens[: mine.prompt_length], other.tokens[other.prompt_length :]
        assert torch.equal(batch.tokens[i], torch.cat([prompt, answer]))
        assert torch.equal(batch.target[batch.sequence == i], answer)


def test_mismatched_answers_are_cut_at_the_context() -> None:
    rows = feedback(4)
    longest = max(g.trajectories[0].length for g in rows)
    batch = mismatched(rows, limit=longest)
    assert max(len(t) for t in batch.tokens) <= longest
    assert int(batch.lengths.min()) >= 1


def test_one_row_has_no_other() -> None:
    with pytest.raises(PosttrainError, match="at least 2 rows"):
        mismatched(feedback(1), limit=100)


def test_kl_of_mismatched_answers_is_that_of_the_definition() -> None:
    policy, start = make_policy(1), make_policy(0)
    reference = Reference(start)
    rows = feedback(5)
    batch = Batch.of(rows)
    supply(frozenset({"mismatched_kl"}), batch, rows, policy, reference, None, temperature=1.0, budget=30)
    other = mismatched(rows, policy.max_length)
    ratio = policy.log_likelihood(other).logp - start.log_likelihood(other).logp
    expected = float(other.sum(ratio.detach()).mean())
    assert batch.extras["mismatched_kl"].shape == batch.target.shape
    assert batch.extras["mismatched_kl"].tolist() == pytest.approx([expected] * batch.target.numel(), rel=1e-4)


def test_what_is_asked_for_is_supplied_and_nothing_else() -> None:
    policy = make_policy()
    rows = pairs(3)
    head = ValueHead(32)
    torch.nn.init.ones_(head.linear.weight)
    batch = Batch.of(rows)
    supply(frozenset(), batch, rows, policy, None, None, temperature=1.0, budget=100)
    assert batch.old_logp is batch.reference_logp is batch.value is None
    supply(frozenset({"old_logp", "value"}), batch, rows, policy, None, head, temperature=0.5, budget=100)
    assert batch.reference_logp is None
    likelihood = policy.log_likelihood(batch, temperature=0.5)
    torch.testing.assert_close(batch.old_logp, likelihood.logp.detach(), rtol=1e-5, atol=1e-5)
    assert likelihood.hidden is not None
    torch.testing.assert_close(batch.value, likelihood.hidden.detach().sum(-1), rtol=1e-4, atol=1e-4)


def test_the_reference_of_an_adapter_is_its_base_in_place() -> None:
    adapted = add_lora(make_policy(), rank=4)
    for name, p in adapted.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    reference = Reference(adapted)
    assert reference.copy is None
    batch = Batch.of(pairs(3))
    with reference.active() as frozen:
        found = frozen.log_likelihood(batch).logp
    assert not found.requires_grad
    assert torch.equal(found, make_policy().log_likelihood(batch).logp)
    assert not torch.allclose(adapted.log_likelihood(batch).logp, found, atol=1e-2)


def test_values_do_not_pull_at_the_hidden_states() -> None:
    hidden = torch.randn(4, 32, requires_grad=True)
    head = ValueHead(32)
    torch.nn.init.ones_(head.linear.weight)
    head(hidden).sum().backward()
    assert hidden.grad is None
    assert head.linear.weight.grad is not None
    assert head(hidden.detach().to(torch.bfloat16)).dtype == torch.float32


def test_a_trajectory_alone_is_a_group() -> None:
    tokens = torch.arange(4)
    batch = mismatched([Group([Trajectory(tokens, tokens > 1)]), Group([Trajectory(tokens + 9, tokens > 2)])], 100)
    assert [t.tolist() for t in batch.tokens] == [[0, 1, 12], [9, 10, 11, 2, 3]]


def test_old_entropies_are_those_of_the_distributions_that_were_drawn_from() -> None:
    policy, rows = make_policy(), demonstrations(3)
    batch = Batch.of(rows)
    supply(frozenset({"old_entropy"}), batch, rows, policy, None, None, temperature=2.0, budget=40)
    expected = []
    for group in rows:
        t = group.trajectories[0]
        logp = (policy.model(t.tokens[None]).logits[0, :-1] / 2).log_softmax(-1)
        expected.append(-(logp.exp() * logp).sum(-1)[t.action_mask[1:]].detach())
    torch.testing.assert_close(batch.extras["old_entropy"], torch.cat(expected), rtol=1e-4, atol=1e-4)
