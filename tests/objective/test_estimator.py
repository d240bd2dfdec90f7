from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from flat_batches import VOCABULARY, pairs, ragged, table_likelihood
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from posttrain.objective.advantage import Demonstration, GroupNormalised, LeaveOneOut, Return
from posttrain.objective.aggregate import ConstantLength, GroupMean, SequenceMean, SequenceSum, TokenMean
from posttrain.objective.batch import Batch
from posttrain.objective.denominator import (
    ClippedWeight,
    CurrentPolicy,
    OldPolicy,
    OldPolicyCompletion,
    OldPolicySequence,
    One,
)
from posttrain.objective.divergence import EntropyBonus, FullKL, ReferenceKL
from posttrain.objective.estimator import Loss, Objective
from posttrain.objective.likelihood import Likelihood
from posttrain.objective.logprob import Head, token_statistics
from posttrain.objective.mask import Clip, DropTruncated, DualClip
from posttrain.objective.pairs import Preference, Sigmoid


@dataclass
class Given:
    """An advantage that a test sets itself."""

    values: Tensor
    needs: frozenset[Any] = frozenset()
    keep_groups: bool = False

    def prepare(self, batch: Batch) -> None:
        batch.advantage = self.values

    def credit(self, batch: Batch, logp: Tensor) -> Any:
        from posttrain.objective.advantage import Credit

        assert batch.advantage is not None
        return Credit(batch.advantage)


def run(objective: Objective, batch: Batch, logp: Tensor, **parts: Any) -> Loss:
    objective.advantage.prepare(batch)
    return objective(batch, Likelihood(logp, **parts), batch.totals)


def gradient(loss: Loss, of: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss.surrogate, of)
    return found


# -- card 051: SFT and DFT by hand -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "value", "slope"), [
    (Objective(Demonstration()), math.log(4), -0.75),
    (Objective(Demonstration(), One()), 0.34657359, -0.1875),
], ids=["sft", "dft"])  # fmt: skip
def test_one_token_of_probability_a_quarter(objective: Objective, value: float, slope: float) -> None:
    batch = ragged([[1]])
    logits = torch.tensor([0.0, math.log(3)], requires_grad=True)
    loss = run(objective, batch, logits.log_softmax(-1)[:1])
    assert loss.value.item() == pytest.approx(value, abs=1e-6)
    assert gradient(loss, logits)[0].item() == pytest.approx(slope, abs=1e-6)


def test_certain_tokens_teach_nothing() -> None:
    batch = ragged([[2]])
    for objective in (Objective(Demonstration()), Objective(Demonstration(), One())):
        logits = torch.tensor([200.0, 0.0], dtype=torch.float64, requires_grad=True)
        loss = run(objective, batch, logits.log_softmax(-1)[:1].expand(2))
        assert loss.value.item() == 0
        assert gradient(loss, logits).abs().max().item() < 1e-50


def test_the_gradient_of_dft_is_that_of_the_mean_probability() -> None:
    batch = ragged([[4], [2]])
    logits = torch.linspace(-1, 1, VOCABULARY, dtype=torch.float64).requires_grad_()
    likelihood = table_likelihood(batch, logits)
    loss = Objective(Demonstration(), One())
    loss.advantage.prepare(batch)
    found = gradient(loss(batch, likelihood, batch.totals), logits)
    (expected,) = torch.autograd.grad(-logits.softmax(-1)[batch.target].mean(), logits)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    # an undetached weight would descend -p log p instead
    p = logits.softmax(-1)[batch.target]
    (wrong,) = torch.autograd.grad(-(p * p.log()).mean(), logits)
    assert (found - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_an_anchor_at_the_start_changes_nothing_and_counts_afterwards(direction: str) -> None:
    # card 051 (b, c): DFT + lambda KL equals DFT for lambda 0, and at the first step for every lambda
    batch = ragged([[3], [2]])
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 4, generator=draw, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCABULARY, 4, generator=draw, dtype=torch.float64)
    elsewhere = torch.randn(5, 4, generator=draw, dtype=torch.float64)

    def of(strength: float | None, base: Tensor) -> tuple[Tensor, Tensor]:
        found = token_statistics(
            hidden,
            batch.target,
            Head(weight),
            reference=(base, Head(weight)),
            divergence=direction,  # type: ignore[arg-type]
        )
        divergences = (FullKL(strength, direction),) if strength is not None else ()  # type: ignore[arg-type]
        objective = Objective(Demonstration(), One(), divergences=divergences)
        loss = run(objective, batch, found.logp, divergence=found.divergence)
        return loss.value, gradient(loss, hidden)

    plain_value, plain = of(None, elsewhere)
    for strength, base in ((0.0, elsewhere), (0.7, hidden.detach())):
        value, found = of(strength, base)
        torch.testing.assert_close(value, plain_value)
        torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-12)
    value, found = of(0.7, elsewhere)
    assert value > plain_value
    assert (found - plain).abs().max() > 1e-4


# -- cards 046 and 181: rows of the table that must agree ------------------------------------------------------------


def test_on_policy_every_row_weighs_its_advantage() -> None:
    batch = ragged([[3, 1], [2, 2]], [[1.0, 0.0], [0.0, 2.0]])
    logp = torch.linspace(-3, -0.5, 8).requires_grad_()
    batch.old_logp = logp.detach().clone()
    clip = (Clip(0.2, 0.2),)
    rows = [
        Objective(GroupNormalised(), CurrentPolicy(), aggregate=TokenMean()),
        Objective(GroupNormalised(), OldPolicy(), clip, TokenMean()),
        Objective(GroupNormalised(), OldPolicySequence(), (Clip(3e-4, 4e-4),), TokenMean()),
        Objective(GroupNormalised(), ClippedWeight(5.0), aggregate=TokenMean()),
        Objective(GroupNormalised(), OldPolicy(), (*clip, DualClip(3.0)), TokenMean()),
    ]
    found = [gradient(run(row, batch, logp), logp) for row in rows]
    assert batch.advantage is not None
    for each in found:
        torch.testing.assert_close(each, -batch.advantage / 8)


def test_on_policy_dr_grpo_is_reinforce_with_the_group_mean_up_to_a_constant() -> None:
    batch = ragged([[3, 1], [2, 2]], [[1.0, 0.0], [0.0, 2.0]])
    logp = torch.linspace(-3, -0.5, 8).requires_grad_()
    batch.old_logp = logp.detach().clone()
    dr_grpo = Objective(GroupNormalised("none"), OldPolicy(), (Clip(0.2, 0.27),), ConstantLength(16))
    reinforce = Objective(Return("group"), aggregate=SequenceSum())
    torch.testing.assert_close(
        16 * gradient(run(dr_grpo, batch, logp), logp), gradient(run(reinforce, batch, logp), logp)
    )


def test_on_policy_rloo_is_the_sum_of_log_probabilities_times_its_advantage() -> None:
    batch = ragged([[3, 1], [2, 2]], [[1.0, 0.0], [0.0, 2.0]])
    logp = torch.linspace(-3, -0.5, 8).requires_grad_()
    objective = Objective(LeaveOneOut(), OldPolicyCompletion(), (Clip(0.2, 0.2),), SequenceMean())
    found = gradient(run(objective, batch, logp), logp)
    torch.testing.assert_close(found, -batch.spread(torch.tensor([1.0, -1.0, -2.0, 2.0])) / 4)


# -- the formula -----------------------------------------------------------------------------------------------------


def test_three_tokens_by_hand() -> None:
    # ratios 1.5 (masked, A > 0), 0.5 (kept, A > 0) and 1.5 (kept, A < 0); a mean over three tokens
    batch = ragged([[3]])
    logp = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    batch.old_logp = logp.detach() - torch.tensor([1.5, 0.5, 1.5]).log()
    objective = Objective(Given(torch.tensor([2.0, 1.0, -1.0])), OldPolicy(), (Clip(0.2, 0.2),))
    loss = run(objective, batch, logp)
    torch.testing.assert_close(gradient(loss, logp), -torch.tensor([0.0, 0.5, -1.5]) / 3)
    torch.testing.assert_close(loss.value, -torch.tensor((1.2 * 2 + 0.5 - 1.5) / 3))
    assert loss.metrics["clip_fraction"] == (1.0, 3)
    assert loss.metrics["ratio"] == pytest.approx((3.5, 3))
    assert loss.metrics["logp"] == (-6.0, 3)
    assert not loss.value.requires_grad


def test_the_divergence_from_the_sampler_is_over_the_tokens_it_drew() -> None:
    batch = ragged([[3]])
    logp = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    batch.behaviour_logp_full = torch.tensor([-0.5, float("nan"), -3.25])
    loss = run(Objective(Demonstration()), batch, logp)
    assert loss.metrics["sampler_kl"] == pytest.approx((0.5 - 0.25, 2))
    weights = torch.tensor([-0.5, 0.25]).exp()
    assert loss.metrics["sampler_chi2"] == pytest.approx((float((weights - 1).square().sum()), 2))
    batch.behaviour_logp_full = torch.full((3,), float("nan"))
    assert "sampler_kl" not in run(Objective(Demonstration()), batch, logp).metrics


def test_divergences_are_added_with_their_coefficient_and_the_same_aggregation() -> None:
    batch = ragged([[1, 2]])
    batch.reference_logp = torch.tensor([-1.0, -2.0, -3.0])
    logp = torch.tensor([-2.0, -2.0, -4.0], requires_grad=True)  # k1: -1, 0, -1
    entropy = torch.tensor([1.0, 2.0, 3.0])
    terms = (ReferenceKL(0.5, "k1"), EntropyBonus(0.1))
    objective = Objective(Given(torch.zeros(3)), OldPolicy(), (), SequenceMean(), terms)
    loss = run(objective, batch, logp, entropy=entropy)
    kl, bonus = (-1.0 + (0.0 - 1.0) / 2) / 2, -(1.0 + (2.0 + 3.0) / 2) / 2
    torch.testing.assert_close(loss.value, torch.tensor(0.5 * kl + 0.1 * bonus))
    torch.testing.assert_close(gradient(loss, logp), 0.5 * torch.tensor([1 / 2, 1 / 4, 1 / 4]))
    assert loss.metrics["kl"] == (-2.0, 3)
    assert loss.metrics["negative_entropy"] == (-6.0, 3)
    assert loss.metrics["entropy"] == (6.0, 3)
    assert objective.needs == {"reference_logp", "entropy"}


def test_a_masked_token_keeps_its_divergence() -> None:
    batch = ragged([[1]])
    batch.reference_logp, batch.old_logp = torch.tensor([-1.0]), torch.tensor([-3.0])
    logp = torch.tensor([-0.5], requires_grad=True)
    objective = Objective(Given(torch.ones(1)), OldPolicy(), (Clip(),), divergences=(ReferenceKL(1.0, "k2"),))
    torch.testing.assert_close(gradient(run(objective, batch, logp), logp), torch.tensor([0.5]))


def test_masks_stand_together() -> None:
    batch = ragged([[1, 1, 1]])
    batch.truncated = torch.tensor([False, False, True])
    logp = torch.zeros(3, requires_grad=True)
    batch.old_logp = -torch.tensor([1.5, 4.0, 1.0]).log()
    advantage = torch.tensor([1.0, -1.0, 1.0])
    objective = Objective(Given(advantage), OldPolicy(), (Clip(0.2, 0.2), DualClip(3.0), DropTruncated()))
    loss = run(objective, batch, logp)
    assert gradient(loss, logp).tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(loss.value, -torch.tensor((1.2 - 3.0 + 0.0) / 3))
    assert loss.metrics["clip_fraction"] == (3.0, 3)


def test_a_preference_loss_is_counted_once_a_pair() -> None:
    batch = pairs([(3, 2), (1, 4)])
    batch.reference_logp = torch.zeros(10)
    logp = torch.full((10,), -0.5, requires_grad=True)
    objective = Objective(Preference(Sigmoid(1.0)), aggregate=GroupMean())
    loss = run(objective, batch, logp)
    margins = torch.tensor([-0.5, 1.5])
    torch.testing.assert_close(loss.value, -torch.nn.functional.logsigmoid(margins).mean())
    slope = torch.sigmoid(-margins) / 2
    expected = torch.cat([-slope[:1].expand(3), slope[:1].expand(2), -slope[1:].expand(1), slope[1:].expand(4)])
    torch.testing.assert_close(gradient(loss, logp), expected)
    assert loss.metrics["accuracy"] == (1.0, 2)
    assert objective.advantage.keep_groups


def test_one_full_vocabulary_divergence_at_most() -> None:
    both = Objective(Demonstration(), divergences=(FullKL(0.1, "forward"), FullKL(0.1, "reverse")))
    with pytest.raises(ValueError, match="one full-vocabulary divergence"):
        _ = both.full_divergence
    single = both.replace(divergences=(EntropyBonus(), FullKL(0.2)))
    assert single.full_divergence == FullKL(0.2)
    assert Objective(Demonstration()).full_divergence is None


# -- micro-batches ---------------------------------------------------------------------------------------------------

OBJECTIVES = {
    "sft": Objective(Demonstration()),
    "dft": Objective(Demonstration(), One()),
    "grpo": Objective(GroupNormalised(), OldPolicy(), (Clip(),), SequenceMean(), (ReferenceKL(0.1),)),
    "dr-grpo": Objective(GroupNormalised("none"), OldPolicy(), (Clip(),), ConstantLength(9)),
    "dapo": Objective(GroupNormalised(), OldPolicy(), (Clip(0.2, 0.28), DropTruncated()), TokenMean()),
    "gspo": Objective(GroupNormalised("batch"), OldPolicySequence(), (Clip(3e-4, 4e-4),), SequenceMean()),
    "rloo": Objective(LeaveOneOut(), OldPolicyCompletion(), (Clip(),), SequenceMean(), (EntropyBonus(0.1),)),
    "cispo": Objective(GroupNormalised(), ClippedWeight(2.0), (), TokenMean(), (EntropyBonus(0.1),)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(deadline=None, max_examples=15)
@given(
    groups=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=4),
    budget=st.integers(1, 30),
    seed=st.integers(0, 99),
)
def test_micro_batches_never_change_loss_or_gradient(
    name: str, groups: list[list[int]], budget: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    batch = ragged(groups, [[float(torch.rand((), generator=draw)) for _ in g] for g in groups])
    batch.truncated = torch.rand(len(batch), generator=draw) < 0.3
    logits = torch.randn(VOCABULARY, generator=draw, dtype=torch.float64).requires_grad_()
    now = table_likelihood(batch, logits).logp.detach()
    batch.old_logp = now + 0.5 * torch.randn(len(now), generator=draw, dtype=torch.float64)
    batch.reference_logp = now + 0.5 * torch.randn(len(now), generator=draw, dtype=torch.float64)
    objective = OBJECTIVES[name]
    objective.advantage.prepare(batch)
    check_split(objective, batch, logits, budget)


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=5),
    budget=st.integers(1, 30),
    seed=st.integers(0, 99),
)
def test_micro_batches_never_change_a_preference_loss(lengths: list[tuple[int, int]], budget: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    batch = pairs(lengths, flip=[0])
    logits = torch.randn(VOCABULARY, generator=draw, dtype=torch.float64).requires_grad_()
    batch.reference_logp = -torch.rand(batch.target.numel(), generator=draw, dtype=torch.float64)
    objective = Objective(Preference(Sigmoid(0.5)), aggregate=GroupMean())
    objective.advantage.prepare(batch)
    check_split(objective, batch, logits, budget)


def check_split(objective: Objective, batch: Batch, logits: Tensor, budget: int) -> None:
    totals = batch.totals
    whole = objective(batch, table_likelihood(batch, logits), totals)
    parts = [
        objective(micro, table_likelihood(micro, logits), totals)
        for micro in batch.split(budget, keep_groups=objective.advantage.keep_groups)
    ]
    torch.testing.assert_close(sum(p.value for p in parts), whole.value, rtol=1e-6, atol=1e-9)
    summed = sum(gradient(p, logits) for p in parts)
    torch.testing.assert_close(summed, gradient(whole, logits), rtol=1e-6, atol=1e-9)
    for name, (total, count) in whole.metrics.items():
        assert sum(p.metrics[name][1] for p in parts) == count
        assert sum(p.metrics[name][0] for p in parts) == pytest.approx(total, rel=1e-5, abs=1e-6)
