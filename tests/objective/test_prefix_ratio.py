"""Prefix ratios: the card's numbers, tool segments, and the exact estimator by enumeration of all sequences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from flat_batches import ragged
from torch import Tensor

from posttrain.objective.batch import Batch
from posttrain.objective.denominator import ClippedWeight, OldPolicy
from posttrain.objective.prefix_ratio import (
    PrefixGeometricMean,
    PrefixMinimum,
    PrefixProduct,
    PrefixRatio,
    by_sequence,
    flat,
    mean_by_number,
)
from posttrain.trajectory import Group, Trajectory

LOG_RATIO = [0.2, -0.5, 0.1, 0.3]
KINDS: tuple[type[PrefixRatio], ...] = (PrefixMinimum, PrefixProduct, PrefixGeometricMean)
LOGP = torch.tensor([-1.0, -2.0, -0.5, -1.5, -3.0, -0.7])


def moved(batch: Batch, log_ratio: list[float]) -> Tensor:
    """Set the old policy so that these are the log-ratios; returns the present log-probabilities."""
    logp = LOGP[: batch.target.numel()]
    batch.old_logp = logp - torch.tensor(log_ratio)
    return logp


def close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
@pytest.mark.parametrize("high", [1.28, None])
def test_a_weights_are_one_where_nothing_moved(kind: type[PrefixRatio], high: float | None) -> None:
    batch = ragged([[3, 1], [2]])
    close(kind(high)(batch, LOGP).weight, [1.0] * 6)  # before any update
    batch.old_logp = LOGP.clone()
    close(kind(high)(batch, LOGP).weight, [1.0] * 6)


def test_b_the_cards_numbers() -> None:
    batch = ragged([[4]])
    logp = moved(batch, LOG_RATIO)
    close(PrefixMinimum(None)(batch, logp).log_ratio, [0.2, -0.3, -0.4, -0.2])
    close(PrefixProduct(None)(batch, logp).log_ratio, [0.2, -0.3, -0.2, 0.1])
    close(PrefixGeometricMean(None)(batch, logp).log_ratio, [0.2, -0.15, -0.2 / 3, 0.1 / 4])


def test_b_every_sequence_starts_anew() -> None:
    batch = ragged([[4], [2]])
    logp = moved(batch, [*LOG_RATIO, 0.4, 0.1])
    close(PrefixMinimum(None)(batch, logp).log_ratio, [0.2, -0.3, -0.4, -0.2, 0.4, 0.5])
    close(PrefixProduct(None)(batch, logp).log_ratio, [0.2, -0.3, -0.2, 0.1, 0.4, 0.5])


def test_c_up_to_two_tokens_the_minimum_is_the_product() -> None:
    batch = ragged([[2, 1], [2, 1]])
    logp = moved(batch, [0.3, -0.7, -0.2, 0.6, 0.9, 0.1])
    for high in (1.28, None):
        minimum, product = PrefixMinimum(high)(batch, logp), PrefixProduct(high)(batch, logp)
        assert torch.equal(minimum.weight, product.weight)
        assert torch.equal(minimum.value, product.value)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_d_what_a_tool_says_changes_no_weight(kind: type[PrefixRatio]) -> None:
    plain = torch.tensor([False, False, True, True, True, True])
    tool = torch.tensor([False, False, True, True, False, False, False, True, True])
    weights = []
    for mask in (plain, tool):
        batch = Batch.of([Group([Trajectory(torch.arange(len(mask)), mask)])])
        weights.append(kind()(batch, moved(batch, LOG_RATIO)).weight)
    assert torch.equal(*weights)


def test_the_minimum_leaves_out_the_token_itself() -> None:
    # inclusive, the second weight would be the square of its ratio
    batch = ragged([[2]])
    weight = PrefixMinimum(None)(batch, moved(batch, [0.0, -0.5])).weight
    close(weight, [1.0, math.exp(-0.5)])


def test_truncation_bounds_the_weight_from_above_alone() -> None:
    batch = ragged([[4]])
    logp = moved(batch, [0.9, -2.0, 3.0, -9.0])
    ratio = PrefixMinimum(1.28)(batch, logp)
    close(ratio.weight, [1.28, math.exp(-1.1), 1.28, math.exp(-11)])
    close(ratio.value, [float(w * x) for w, x in zip(ratio.weight, logp, strict=True)])
    close(ratio.log_ratio, [0.9, -1.1, 1.0, -11.0])
    untruncated = PrefixMinimum(None)(batch, logp)
    close(untruncated.weight, [math.exp(x) for x in (0.9, -1.1, 1.0, -11.0)])
    assert torch.equal(untruncated.value, untruncated.weight)


def test_cap_and_floor() -> None:
    batch = ragged([[4]])
    logp = moved(batch, [0.4, 0.3, -3.0, 0.2])
    close(PrefixMinimum(None)(batch, logp).log_ratio, [0.4, 0.7, -2.7, -2.8])
    close(PrefixMinimum(None, cap_one=True)(batch, logp).log_ratio, [0.4, 0.3, -3.0, -2.8])
    close(PrefixMinimum(None, floor=0.5)(batch, logp).log_ratio, [0.4, 0.7, -2.7, math.log(0.5) + 0.2])


def test_a_single_token_has_its_own_ratio() -> None:
    batch = ragged([[1], [1], [1]])
    logp = moved(batch, [0.9, -0.4, 0.1])
    for kind in KINDS:
        assert torch.equal(kind(None)(batch, logp).weight, OldPolicy()(batch, logp).weight)
        torch.testing.assert_close(kind(1.28)(batch, logp).weight, ClippedWeight(1.28)(batch, logp).weight)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_weights_are_constants(kind: type[PrefixRatio]) -> None:
    batch = ragged([[4]])
    logp = moved(batch, LOG_RATIO).clone().requires_grad_()
    ratio = kind()(batch, logp)
    assert not any(x.requires_grad for x in (ratio.weight, ratio.value, ratio.log_ratio))


def test_extreme_ratios_stay_finite() -> None:
    batch = ragged([[4]])
    for drift in (-40.0, 40.0):
        logp = moved(batch, [drift] * 4)
        for kind in KINDS:
            assert bool(kind(1.28)(batch, logp).weight.isfinite().all())


def test_tables_and_back() -> None:
    batch = ragged([[3, 1], [2]])
    values = torch.arange(1.0, 7.0)
    table = by_sequence(batch, values, fill=-1.0)
    assert table.tolist() == [[1, 2, 3], [4, -1, -1], [5, 6, -1]]
    assert torch.equal(flat(batch, table), values)
    close(mean_by_number(batch, values), [(1 + 4 + 5) / 3, (2 + 6) / 2, 3])


# -- the exact estimator, by enumeration -----------------------------------------------------------------------------

SYMBOLS, LENGTH = 3, 4
EVERY = torch.tensor(list(itertools.product(range(SYMBOLS), repeat=LENGTH)))  # [81, LENGTH]


def sequence_logp(table: Tensor) -> Tensor:
    """`[81, LENGTH]` log-probabilities of a policy with a softmax for each place and symbol before it."""
    before = torch.cat([torch.zeros(len(EVERY), 1, dtype=torch.int64), EVERY[:, :-1]], 1)
    place = torch.arange(LENGTH).expand_as(EVERY)
    return table.log_softmax(-1)[place, before].gather(2, EVERY[..., None])[..., 0]


def action_values(logp: Tensor, reward: Tensor) -> Tensor:
    """`[81, LENGTH]`: the mean reward, under the policy, of what starts with each prefix."""
    chance = logp.sum(1).exp()
    found = torch.empty_like(logp)
    for t in range(LENGTH):
        prefix = (EVERY[:, : t + 1] * SYMBOLS ** torch.arange(t + 1)).sum(1)
        mass, earned = (torch.zeros(SYMBOLS ** (t + 1), dtype=logp.dtype) for _ in range(2))
        mass.index_add_(0, prefix, chance)
        earned.index_add_(0, prefix, chance * reward)
        found[:, t] = (earned / mass)[prefix]
    return found


def expected_gradient(weight: Callable[[Batch, Tensor], Tensor], drift: float) -> tuple[Tensor, Tensor]:
    """E_old[sum_t w_t Q_t grad log pi] over all sequences, and the true gradient of the expected reward."""
    draw = torch.Generator().manual_seed(0)
    shape = (LENGTH, SYMBOLS, SYMBOLS)
    old = torch.randn(shape, generator=draw, dtype=torch.float64)
    table = (old + drift * torch.randn(shape, generator=draw, dtype=torch.float64)).requires_grad_()
    reward = torch.rand(len(EVERY), generator=draw, dtype=torch.float64)
    logp, old_logp = sequence_logp(table), sequence_logp(old)
    (truth,) = torch.autograd.grad((logp.sum(1).exp() * reward).sum(), table, retain_graph=True)
    rows = [Trajectory(torch.cat([torch.zeros(1, dtype=torch.int64), s]), torch.arange(LENGTH + 1) > 0) for s in EVERY]
    batch = Batch.of([Group(rows)])
    batch.old_logp = old_logp.flatten()
    found = weight(batch, logp.detach().flatten()).view_as(logp)
    credit = old_logp.sum(1).exp()[:, None] * found * action_values(logp.detach(), reward)
    (gradient,) = torch.autograd.grad((credit * logp).sum(), table)
    return gradient, truth


@pytest.mark.parametrize("drift", [0.3, 1.5])
def test_the_product_is_exact(drift: float) -> None:
    gradient, truth = expected_gradient(lambda b, logp: PrefixProduct(None)(b, logp).weight, drift)
    torch.testing.assert_close(gradient, truth, rtol=1e-9, atol=1e-12)


def test_the_others_are_biased_where_the_policy_has_moved_and_exact_where_not() -> None:
    weights: list[Callable[[Batch, Tensor], Tensor]] = [
        lambda b, logp: OldPolicy()(b, logp).weight,
        lambda b, logp: PrefixMinimum(None)(b, logp).weight,
        lambda b, logp: PrefixGeometricMean(None)(b, logp).weight,
    ]
    for weight in weights:
        still, truth = expected_gradient(weight, 0.0)
        torch.testing.assert_close(still, truth, rtol=1e-9, atol=1e-12)
        far, truth = expected_gradient(weight, 1.5)
        assert float((far - truth).norm() / truth.norm()) > 0.02
