from __future__ import annotations

import math

import pytest
import torch
from flat_batches import ragged
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.objective.denominator import (
    ClippedWeight,
    CurrentPolicy,
    OldPolicy,
    OldPolicyCompletion,
    OldPolicySequence,
    One,
)

LOGP = torch.tensor([-1.0, -2.0, -3.0])
OLD = torch.tensor([-1.5, -1.0, -3.0])  # log-ratios 0.5, -1, 0
ALL = (CurrentPolicy(), One(), OldPolicy(), OldPolicySequence(), OldPolicyCompletion(), ClippedWeight())


def close(found: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected))


def test_current_policy_and_one_by_hand() -> None:
    batch = ragged([[3]])
    plain = CurrentPolicy()(batch, LOGP)
    close(plain.weight, [1.0, 1.0, 1.0])
    close(plain.value, [-1.0, -2.0, -3.0])  # the paper's loss is the log-likelihood itself
    own = One()(batch, LOGP)
    close(own.weight, [math.exp(-1), math.exp(-2), math.exp(-3)])
    close(own.value, [-math.exp(-1), -2 * math.exp(-2), -3 * math.exp(-3)])


def test_token_ratio_by_hand() -> None:
    batch = ragged([[3]])
    batch.old_logp = OLD
    ratio = OldPolicy()(batch, LOGP)
    close(ratio.weight, [math.exp(0.5), math.exp(-1), 1.0])
    close(ratio.value, [math.exp(0.5), math.exp(-1), 1.0])
    close(ratio.log_ratio, [0.5, -1.0, 0.0])


def test_sequence_ratio_is_the_mean_not_the_sum() -> None:
    batch = ragged([[2], [1]])
    batch.old_logp = OLD
    ratio = OldPolicySequence()(batch, LOGP)
    close(ratio.log_ratio, [-0.25, -0.25, 0.0])
    close(ratio.weight, [math.exp(-0.25), math.exp(-0.25), 1.0])


def test_completion_ratio_is_the_product() -> None:
    batch = ragged([[2], [1]])
    batch.old_logp = OLD
    ratio = OldPolicyCompletion()(batch, LOGP)
    close(ratio.log_ratio, [-0.5, -0.5, 0.0])
    close(ratio.value, [math.exp(-0.5), math.exp(-0.5), 1.0])
    close(ratio.weight, [2 * math.exp(-0.5), 2 * math.exp(-0.5), 1.0])


@settings(deadline=None, max_examples=30)
@given(length=st.integers(1, 64), drift=st.floats(-0.1, 0.1))
def test_sequence_ratio_does_not_grow_with_length(length: int, drift: float) -> None:
    batch = ragged([[length]])
    batch.old_logp = torch.full((length,), -2.0)
    found = OldPolicySequence()(batch, batch.old_logp + drift).weight
    torch.testing.assert_close(found, torch.full((length,), math.exp(drift)), rtol=1e-4, atol=0)


def test_clipped_weight_by_hand() -> None:
    batch = ragged([[3]])
    batch.old_logp = LOGP - torch.tensor([9.0, 0.1, 1.0]).log()
    ratio = ClippedWeight(5.0)(batch, LOGP)
    close(ratio.weight, [5.0, 0.1, 1.0])  # card 181 (c): a ratio of 9 weighs 5; there is no lower bound
    close(ratio.value, [-5.0, -0.2, -3.0])
    close(ratio.log_ratio, [math.log(9), math.log(0.1), 0.0])


@pytest.mark.parametrize("denominator", ALL[2:], ids=lambda d: type(d).__name__)
def test_ratio_is_one_where_no_update_has_happened(denominator) -> None:
    batch = ragged([[1], [1], [1]])
    ratio = denominator(batch, LOGP)
    close(ratio.weight, [1.0, 1.0, 1.0])
    close(ratio.log_ratio, [0.0, 0.0, 0.0])


@pytest.mark.parametrize("denominator", ALL, ids=lambda d: type(d).__name__)
def test_ratios_are_constants(denominator) -> None:
    # card 046: the denominator is detached everywhere, or DFT would descend p log p
    batch = ragged([[3]])
    batch.old_logp = OLD
    ratio = denominator(batch, LOGP.clone().requires_grad_())
    assert not any(part.requires_grad for part in (ratio.weight, ratio.value, ratio.log_ratio))


def test_card_181_first_order_expansion() -> None:
    # the product of 1 + 0.01 and 1 - 0.02 against one plus the sum of the deviations
    batch = ragged([[2]])
    batch.old_logp = torch.zeros(2, dtype=torch.float64)
    logp = torch.tensor([1.01, 0.98], dtype=torch.float64).log()
    product = OldPolicyCompletion()(batch, logp).value[0]
    tokens = OldPolicy()(batch, logp).value
    assert product.item() == pytest.approx(0.9898, abs=1e-12)
    assert (product - (1 + (tokens - 1).sum())).item() == pytest.approx(-2e-4, abs=1e-12)
