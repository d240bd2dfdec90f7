"""Spikes, divergence and what rose before: on curves made by hand."""

from __future__ import annotations

import math

import pytest

from posttrain.evaluation.stability import StabilityRule
from posttrain.trajectory import PosttrainError

RULE = StabilityRule(threshold=0.5, window=5)
FALLING = [3.0 * 0.95**step for step in range(60)]


def curve(**changes: float) -> list[float]:
    """The falling loss with some steps changed."""
    return [changes.get(f"at{step}", loss) for step, loss in enumerate(FALLING)]


def test_a_falling_loss_is_stable() -> None:
    assert RULE.diverged(FALLING) is None
    assert RULE.spikes(FALLING) == []
    assert RULE.lead(FALLING, [(0, 1.0), (10, 9.0)]) is None


def test_a_spike_is_a_run_of_high_losses() -> None:
    losses = curve(at30=2.0, at31=1.9, at40=2.5)
    assert RULE.spikes(losses) == [30, 40]
    assert RULE.diverged(losses) is None
    # just below the threshold above the running mean, it is noise
    mean = FALLING[0]
    for loss in FALLING[1:20]:
        mean = 0.9 * mean + 0.1 * loss
    assert RULE.spikes(curve(at20=mean + 0.499)) == []
    assert RULE.spikes(curve(at20=mean + 0.501)) == [20]


def test_above_the_first_loss_is_high() -> None:
    losses = [1.0, 0.9, 1.01, *([0.9] * 10)]
    assert RULE.spikes(losses) == [2]


def test_what_lasts_is_a_divergence() -> None:
    losses = FALLING[:30] + [4.0] * 5
    assert RULE.diverged(losses) == 30
    assert RULE.spikes(losses) == [], "it is no spike"
    assert RULE.diverged(FALLING[:30] + [4.0] * 4 + FALLING[34:]) is None
    assert RULE.spikes([*losses[:10], 9.0, *losses[11:], 9.0]) == [10]


def test_no_number_is_high_and_to_the_end_it_is_a_divergence() -> None:
    assert RULE.spikes(curve(at20=math.nan)) == [20]
    assert RULE.diverged([*FALLING, math.inf]) == len(FALLING)
    assert RULE.diverged([math.nan, 3.0, 2.9]) is None


def test_the_lead_of_sharpness() -> None:
    losses = FALLING[:30] + [4.0] * 20
    watched = [(0, 1.0), (10, 0.8), (20, 1.7), (30, 9.0)]  # 1.7 is more than twice the least before
    assert RULE.lead(losses, watched) == 10
    assert RULE.lead(losses, [(0, 1.0), (20, 1.5), (40, 9.0)]) is None, "it rose afterwards"
    assert RULE.lead(curve(at25=3.0), watched) == 5
    assert RULE.lead(losses, [(0, 1.0), (28, math.nan)]) == 2


def test_numbers_that_are_no_rule() -> None:
    with pytest.raises(PosttrainError, match="window 1"):
        StabilityRule(window=1)
