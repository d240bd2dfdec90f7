"""The analysis of seeds crossed with prompts, by hand, in its limits, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from posttrain.studies.crossed import crossed
from posttrain.trajectory import PosttrainError


def test_by_hand() -> None:
    """Rows [0, 1] and [2, 5]: mean 2; row means 0.5, 3.5; column means 1, 3; one degree of freedom each.

    MS of seeds 2·(1.5² + 1.5²) = 9, of prompts 2·(1 + 1) = 4, residuals ±0.5: 1. So V = (9 + 4 - 1)/4 = 3 with
    12² / (9² + 4² + 1²) = 144/98 degrees of freedom.
    """
    found = crossed([[0, 1], [2, 5]])
    reach = stats.t.ppf(0.975, 144 / 98) * math.sqrt(3)
    assert found.mean == 2
    assert found.interval == pytest.approx((2 - reach, 2 + reach))
    assert found.pvalue == pytest.approx(2 * stats.t.sf(2 / math.sqrt(3), 144 / 98))


def test_seeds_that_agree_leave_the_t_test_over_prompts() -> None:
    prompts = np.array([0.0, 1.0, 0.5, 0.25, 1.0])
    for table in (prompts[None], np.tile(prompts, (3, 1))):
        found = crossed(table)
        test = stats.ttest_1samp(prompts, 0)
        assert found.pvalue == pytest.approx(test.pvalue)
        assert found.interval == pytest.approx(tuple(test.confidence_interval()))


def test_prompts_that_agree_leave_the_t_test_over_seeds() -> None:
    seeds = np.array([0.1, 0.4, 0.2])
    for table in (seeds[:, None], np.tile(seeds[:, None], (1, 7))):
        found = crossed(table)
        test = stats.ttest_1samp(seeds, 0)
        assert found.pvalue == pytest.approx(test.pvalue)
        assert found.interval == pytest.approx(tuple(test.confidence_interval()))


def test_too_little_and_nothing_to_go_by() -> None:
    one = crossed([[0.5]])
    assert (one.mean, math.isnan(one.pvalue), math.isnan(one.interval.low)) == (0.5, True, True)
    assert crossed(np.zeros((3, 5))).pvalue == 1
    same = crossed(np.full((3, 5), 0.3))
    assert same.pvalue == 0
    assert same.interval == pytest.approx((0.3, 0.3))
    with pytest.raises(PosttrainError, match=r"crossed: values \[3\]; expected \[seeds, prompts\]"):
        crossed([1, 2, 3])


@pytest.mark.parametrize(("of_seeds", "of_prompts"), [(0.0, 0.3), (0.05, 0.3), (0.1, 0.0), (0.0, 0.0)])
def test_nineteen_of_twenty_intervals_hold_the_truth(of_seeds: float, of_prompts: float) -> None:
    generator = np.random.default_rng(0)
    seeds, prompts, held = 3, 60, []
    for _ in range(400):
        table = generator.normal(0, 0.3, (seeds, prompts))
        table += generator.normal(0, of_seeds, (seeds, 1)) + generator.normal(0, of_prompts, (1, prompts))
        low, high = crossed(table).interval
        held.append(low <= 0 <= high)
    assert 0.89 <= float(np.mean(held)) <= 0.985
