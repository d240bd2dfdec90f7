"""Importance against the engine: the card's numbers, what masks look at, and the first-order theorem by enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from flat_batches import ragged
from torch import Tensor

from posttrain.methods import minirl
from posttrain.objective.batch import Batch
from posttrain.objective.denominator import ClippedWeight, OldPolicy
from posttrain.objective.likelihood import Likelihood
from posttrain.objective.mask import Clip, DropClipped
from posttrain.objective.sampler_ratio import SamplerCorrected

LOGP = torch.tensor([-1.0, -2.0, -0.5, -1.5])


def close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=1e-5, atol=1e-6)


def batch_of(discrepancy: list[float], staleness: list[float] | None = None) -> Batch:
    """One sequence with these ratios pi_old / mu and pi / pi_old."""
    batch = ragged([[len(discrepancy)]])
    old = LOGP[: len(discrepancy)] - (0 if staleness is None else torch.tensor(staleness).log())
    batch.old_logp = None if staleness is None else old
    batch.behaviour_logp_full = old - torch.tensor(discrepancy).log()
    return batch


def test_the_weight_is_the_whole_ratio_and_masks_see_the_staleness() -> None:
    batch = batch_of([2.0, 0.5, 1.0, 4.0], [1.5, 1.2, 0.7, 1.0])
    ratio = SamplerCorrected()(batch, LOGP)
    close(ratio.weight, [3.0, 0.6, 0.7, 4.0])
    close(ratio.value, [-3.0, -1.2, -0.35, -6.0])
    close(ratio.log_ratio, [math.log(x) for x in (1.5, 1.2, 0.7, 1.0)])


def test_c_a_ratio_of_nine_weighs_five() -> None:
    batch = batch_of([9.0, 6.0, 0.01, 4.9], [1.0, 1.5, 1.0, 1.0])
    close(SamplerCorrected(5.0)(batch, LOGP).weight, [5.0, 5.0, 0.01, 4.9])


def test_before_any_update_there_is_no_staleness() -> None:
    ratio = SamplerCorrected()(batch_of([2.0, 0.5, 1.0, 4.0]), LOGP)
    close(ratio.weight, [2.0, 0.5, 1.0, 4.0])
    assert bool((ratio.log_ratio == 0).all())


def test_an_engine_that_agrees_with_the_trainer_leaves_the_truncated_ratio() -> None:
    batch = batch_of([1.0] * 4, [1.5, 7.0, 0.7, 1.0])
    for mine, other in zip(*(_parts(d(5.0), batch) for d in (SamplerCorrected, ClippedWeight)), strict=True):
        assert torch.equal(mine, other)


def _parts(denominator: SamplerCorrected | ClippedWeight, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    found = denominator(batch, LOGP)
    return found.weight, found.value, found.log_ratio


def test_tokens_that_no_engine_sampled_have_no_discrepancy() -> None:
    batch = batch_of([2.0, 0.5, 1.0, 4.0], [1.5, 1.2, 0.7, 8.0])
    batch.behaviour_logp_full[1:] = float("nan")
    close(SamplerCorrected(5.0)(batch, LOGP).weight, [3.0, 1.2, 0.7, 5.0])


def test_the_weight_is_a_constant() -> None:
    ratio = SamplerCorrected()(batch_of([2.0] * 4, [1.1] * 4), LOGP.clone().requires_grad_())
    assert not any(x.requires_grad for x in (ratio.weight, ratio.value, ratio.log_ratio))


# -- the mask --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("staleness", "advantage", "kept"),
    [
        (1.3, 1.0, False),
        (1.3, -1.0, True),
        (0.75, -1.0, False),
        (0.75, 1.0, True),
        (1.26, 1.0, True),
        (0.81, -1.0, True),
    ],
)
def test_b_tokens_past_the_band_drop_out(staleness: float, advantage: float, kept: bool) -> None:
    # the discrepancy is large and must not matter
    batch = batch_of([3.0, 0.3], [staleness] * 2)
    ratio = SamplerCorrected()(batch, LOGP[:2])
    found = DropClipped(0.2, 0.27)(batch, ratio, torch.full((2,), advantage))
    assert found.keep.tolist() == [kept, kept]
    assert bool((found.bound == 0).all())


def test_the_same_tokens_as_ppos_clipping() -> None:
    batch = batch_of([1.0] * 4, [1.5, 0.5, 1.0, 1.25])
    ratio = OldPolicy()(batch, LOGP)
    for advantage in (torch.ones(4), -torch.ones(4)):
        drop, clip = (mask(0.2, 0.2)(batch, ratio, advantage) for mask in (DropClipped, Clip))
        assert torch.equal(drop.keep, clip.keep)


def test_the_loss_of_a_masked_token_is_zero() -> None:
    batch = batch_of([1.0, 1.0], [1.5, 1.0])
    batch.advantage = torch.ones(2)
    loss = minirl().objective(batch, Likelihood(LOGP[:2]), batch.totals)
    assert float(loss.value) == pytest.approx(-float(LOGP[1]))


# -- the theorem -----------------------------------------------------------------------------------------------------


def relative_error(length: int, size: float, seed: int = 0) -> float:
    """How far the gradient of the token-level objective is from the sequence's, with logits perturbed by `size`."""
    draw = torch.Generator().manual_seed(seed)
    symbols = 3
    every = torch.tensor(list(itertools.product(range(symbols), repeat=length)))
    place = torch.arange(length).expand_as(every)
    sampler = torch.randn(length, symbols, generator=draw, dtype=torch.float64)
    noise = torch.randn(length, symbols, generator=draw, dtype=torch.float64)
    policy = (sampler + size * noise).requires_grad_()
    reward = (torch.rand(len(every), generator=draw, dtype=torch.float64) > 0.5).double()
    logp, mu = (table.log_softmax(-1)[place, every] for table in (policy, sampler))
    chance = mu.sum(1).exp()
    whole = (chance * (logp - mu).sum(1).exp() * reward).sum()
    tokens = (chance * (logp - mu).exp().sum(1) * reward).sum()
    truth, found = (torch.autograd.grad(of, policy, retain_graph=True)[0] for of in (whole, tokens))
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("length", [3, 6])
def test_the_token_objective_is_right_to_first_order(length: int) -> None:
    sizes = [1e-3, 1e-2, 1e-1]
    errors = [relative_error(length, size) for size in sizes]
    slopes = [math.log10(b / a) for a, b in itertools.pairwise(errors)]
    assert all(0.9 < slope < 1.1 for slope in slopes)


def test_its_error_grows_with_length() -> None:
    errors = [sum(relative_error(length, 1e-2, seed) for seed in range(5)) for length in (2, 4, 7)]
    assert errors[0] < errors[1] < errors[2]


def test_d_the_cards_expansion() -> None:
    weights = SamplerCorrected()(_deviations(0.01, -0.02), torch.zeros(2, dtype=torch.float64)).weight
    assert float(weights.prod()) == pytest.approx(0.9898, abs=1e-9)
    assert 1 + float((weights - 1).sum()) == pytest.approx(0.99, abs=1e-9)
    assert float(weights.prod()) - (1 + float((weights - 1).sum())) == pytest.approx(-2e-4, abs=1e-9)


def _deviations(*deltas: float) -> Batch:
    batch = ragged([[len(deltas)]])
    batch.behaviour_logp_full = -(1 + torch.tensor(deltas, dtype=torch.float64)).log()
    return batch
