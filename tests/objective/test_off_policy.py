"""Denominators for tokens that the policy did not write, and what their losses are divided by."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flat_batches import ragged

from posttrain.objective.aggregate import PromptMean
from posttrain.objective.batch import Batch
from posttrain.objective.denominator import CurrentPolicy, OldPolicy, One
from posttrain.objective.off_policy import BySource, Probability, Shaped
from posttrain.objective.schedule import Complement, Cosine
from posttrain.trajectory import SOURCES, Group, Trajectory

LOGP = torch.tensor([0.05, 0.1, 0.5, 0.9]).log()


def four_tokens() -> Batch:
    batch = ragged([[4]])
    return replace(batch, old_logp=LOGP - torch.tensor([0.1, 0.2, 0.3, 0.4]))


def test_every_token_has_the_denominator_of_who_wrote_it() -> None:
    policy, expert = SOURCES.index("policy"), SOURCES.index("expert")
    batch = replace(four_tokens(), token_source=torch.tensor([expert, expert, policy, policy]))
    found = BySource(OldPolicy(), Shaped(0.1))(batch, LOGP)
    on, off = OldPolicy()(batch, LOGP), Shaped(0.1)(batch, LOGP)
    for name in ("weight", "value", "log_ratio"):
        mixed, own, other = (getattr(r, name) for r in (found, on, off))
        assert torch.equal(mixed, torch.cat([other[:2], own[2:]]))
    assert torch.equal(BySource()(batch, LOGP).weight[:2], CurrentPolicy()(batch, LOGP).weight[:2])


def test_the_shaped_weight_is_the_derivative_of_the_shaped_probability() -> None:
    logp = LOGP.double().requires_grad_()
    p = logp.exp()
    (wanted,) = torch.autograd.grad((p / (p + 0.3)).sum(), logp)
    found = Shaped(0.3)(four_tokens(), logp)
    torch.testing.assert_close(found.weight, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.value, (p / (p + 0.3)).detach(), rtol=1e-12, atol=1e-12)


def test_the_plain_probability_pulls_as_one_does() -> None:
    found, one = Probability()(four_tokens(), LOGP), One()(four_tokens(), LOGP)
    assert torch.equal(found.weight, one.weight)
    assert torch.equal(found.value, LOGP.exp())


def test_a_mean_over_prompts_counts_those_without_a_demonstration() -> None:
    tokens = torch.tensor([1, 2, 3, 4])
    mask = torch.tensor([False, False, True, True])

    def one(source: str) -> Trajectory:
        return Trajectory(tokens, mask, source=source)  # type: ignore[arg-type]

    step = Batch.of([Group([one("policy"), one("expert")]), Group([one("policy")]), Group([one("policy")])])
    shown = step.select(torch.tensor([1]))
    assert PromptMean()(shown, step.totals.of_sources(["expert"])).tolist() == pytest.approx([1 / 6, 1 / 6])


def test_two_weights_add_up_to_one() -> None:
    schedule = Cosine(0.9, 0.1, 2, 10)
    for step in range(15):
        assert Complement(schedule)(step, 20) + schedule(step, 20) == pytest.approx(1)
    assert Complement(0.3)(0, 1) == 0.7
