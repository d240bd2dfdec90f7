"""The risk measure of bundled rewards: the card's numbers, exact gradients on a bandit, tracking, and its edges."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pytest
import torch
from flat_batches import ragged
from torch import Tensor

from posttrain.objective.batch import Batch
from posttrain.objective.risk import LEVELS, MixedValueAtRisk, quantiles, tail_mean
from posttrain.trajectory import PosttrainError


def rewarded(*groups: Sequence[float]) -> Batch:
    """Groups of one-token completions with these rewards."""
    return ragged([[1] * len(g) for g in groups], groups)


def part(**arguments: object) -> MixedValueAtRisk:
    return MixedValueAtRisk(**{"sharing": "uniform", "bundle": 1, **arguments})  # type: ignore[arg-type]


def tracking(low: float, high: float, **arguments: object) -> MixedValueAtRisk:
    """With these quantiles tracked at the levels 0.2 and 0.8."""
    made = part(**arguments)
    made.tracked = [low if level < 0.5 else high for level in LEVELS]
    return made


def close(found: Tensor, expected: Sequence[float], **tolerance: float) -> None:
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=found.dtype), **{"rtol": 1e-5, "atol": 1e-6, **tolerance}
    )


# -- the card's unit checks ------------------------------------------------------------------------------------------

SCORES = torch.tensor([0.0, 2.0, 5.0])


def test_a_the_cards_numbers() -> None:
    close(part().paper(SCORES, 1, 4), [-3, 2 / 3, 2])
    close(part(weight=0.0).paper(SCORES, 1, 4), [0, 5 / 3, 5])  # the middle alone
    close(part(natural_baseline=True).paper(SCORES, 1, 4), [-5, -4 / 3, 0])
    risky = part(tail="upper")
    close(risky.paper(SCORES, 1, 4), [0, 5 / 3 / 2.5, (1.5 * 1 / 0.2 + 5) / 2.5])


def test_b_without_tails_it_is_the_score_over_a_baseline() -> None:
    whole = part(alpha=1e-9, beta=1 - 1e-9, weight=0.0)
    close(whole.paper(SCORES, -1, 6), [1, 3, 6])


def test_c_the_top_is_flat() -> None:
    scores = torch.tensor([4.0, 4.5, 9.0])
    found = part().paper(scores, 1, 4)
    assert found[0] == found[1] == found[2]
    assert len(part(tail="upper").paper(scores, 1, 4).unique()) == 3


def test_d_tracking_converges_to_the_quantiles_of_a_fixed_distribution() -> None:
    made = part(rate=0.1)
    draw = torch.Generator().manual_seed(0)
    made.tracked = [0.0] * len(LEVELS)
    for _ in range(800):
        made.follow(torch.rand(64, generator=draw) * 10)
    for level, found in zip(LEVELS, made.tracked, strict=True):
        assert found == pytest.approx(10 * level, abs=0.2)


def test_d_the_step_by_hand() -> None:
    made = part(rate=0.1)
    made.tracked = [2.0] * len(LEVELS)
    made.follow(torch.tensor([1.0, 2.0, 2.0, 3.0]))  # a quarter is strictly below 2
    for level, found in zip(LEVELS, made.tracked, strict=True):
        assert found == pytest.approx(2 + 0.1 * (level - 0.25))


def bandit_gradient(risk: Callable[[Tensor], Tensor], seed: int) -> Tensor:
    """Gradient of a risk of the scores 0..4 of a softmax policy, by finite differences on its logits."""
    logits = torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = torch.empty(5, dtype=torch.float64)
    for i in range(5):
        shift = torch.zeros(5, dtype=torch.float64)
        shift[i] = 1e-6
        found[i] = (risk((logits + shift).softmax(0)) - risk((logits - shift).softmax(0))) / 2e-6
    return found


def exact_quantile(p: Tensor, level: float) -> float:
    return float((p.cumsum(0) < level).sum())


def exact_tail_mean(p: Tensor, level: float) -> Tensor:
    """Mean of the scores below their quantile, the scores as they come in order of size."""
    left, total = level, torch.zeros((), dtype=torch.float64)
    for score, share in enumerate(p):
        taken = min(float(share), left)
        total, left = total + score * (share if taken == float(share) else left), left - taken
        if left <= 0:
            break
    return total / level


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.8), (0.35, 0.61)])
def test_e_in_expectation_it_is_the_gradient_of_the_risk(seed: int, alpha: float, beta: float) -> None:
    logits = torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    p = logits.softmax(0)
    assert float((p.cumsum(0) - alpha).abs().min()) > 1e-4  # the quantile itself does not jump
    scores = torch.arange(5.0, dtype=torch.float64)
    low, high = exact_quantile(p, alpha), exact_quantile(p, beta)

    def expected_score(advantage: Tensor) -> Tensor:
        """E[A grad log pi] for a softmax: p_i (A_i - E A)."""
        return p * (advantage - (p * advantage).sum())

    def rvar(p: Tensor) -> Tensor:
        return (beta * exact_tail_mean(p, beta) - alpha * exact_tail_mean(p, alpha)) / (beta - alpha)

    made = part(alpha=alpha, beta=beta)
    cvar_gradient = bandit_gradient(lambda p: exact_tail_mean(p, alpha), seed)
    middle = part(alpha=alpha, beta=beta, weight=0.0).paper(scores, low, high)
    torch.testing.assert_close(expected_score(middle), bandit_gradient(rvar, seed), rtol=1e-6, atol=1e-8)
    mixed = bandit_gradient(lambda p: (1.5 * exact_tail_mean(p, alpha) + rvar(p)) / 2.5, seed)
    found = expected_score(made.paper(scores, low, high))
    torch.testing.assert_close(found, mixed, rtol=1e-6, atol=1e-8)
    tail = (2.5 * found - expected_score(middle)) / 1.5
    torch.testing.assert_close(tail, cvar_gradient, rtol=1e-6, atol=1e-8)
    shifted = part(alpha=alpha, beta=beta, natural_baseline=True).paper(scores, low, high)
    torch.testing.assert_close(expected_score(shifted), found, rtol=1e-9, atol=1e-12)


def test_the_reported_tail_means() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    # the quantile 0.8 of five equally likely scores, interpolated; (0.8 - 1 * (0.8 - 0) / 5 / 0.2) = 0
    assert tail_mean(scores, 0.2) == pytest.approx(0.0, abs=1e-6)
    assert tail_mean(scores, 0.999999) == pytest.approx(2.0, abs=1e-4)
    made = part(bundle=1)
    batch = rewarded(scores.tolist())
    made.prepare(batch)
    figures = {k: v.item() for k, v in (made.credit(batch, batch.reward).metrics or {}).items()}
    lower, upper = 0.2 * tail_mean(scores, 0.2), 0.8 * tail_mean(scores, 0.8)
    assert figures["cvar"] == pytest.approx(lower / 0.2)
    assert figures["rvar"] == pytest.approx((upper - lower) / 0.6)
    assert figures["quantile_low"] == pytest.approx(0.8)
    assert figures["quantile_high"] == pytest.approx(3.2)


# -- bundles, and credit to their completions ------------------------------------------------------------------------

TWO = rewarded([1, 0, 0, 1], [1, 1, 0, 0])  # scores 2, 1, 0, 1


def test_a_paper_is_the_jth_completion_of_every_prompt() -> None:
    made = tracking(1.0, 1.0, bundle=2)  # A = -7.5 (1 - S)^+ / 2.5: only the score 0 is below
    found = made.of(TWO)
    spread = torch.tensor([2.0, 1.0, 0.0, 1.0]).std()
    expected = -1.5 * 5 / 2.5 / (float(spread) + 1e-6)
    close(found, [0, 0, expected, 0] * 2)


def test_ways_of_sharing() -> None:
    def shared(sharing: str) -> Tensor:
        return tracking(-1.0, 9.0, bundle=2, sharing=sharing).of(TWO)

    whole = shared("uniform")
    assert bool((whole[:4] == whole[4:]).all())
    paper = whole[:4]
    spread = torch.tensor([1.0, 0.0, 0.0, 1.0]).std()
    close(shared("std"), [float(a / spread) for a in whole])
    close(shared("score"), [float(a) * (0.5 if r else 1.5) for a, r in zip(whole, TWO.reward, strict=True)])
    # over their prompts' means: +-0.5 each, so papers 2 and 4 sum to 0 and are shared evenly
    close(shared("sum-mean"), [float(paper[0]) / 2, float(paper[1]) / 2, float(paper[2]) / 2, float(paper[3]) / 2] * 2)
    uneven = rewarded([1, 0, 0], [1, 1, 0])  # over the means: 2/3, -1/3, -1/3 and 1/3, 1/3, -2/3; sums 1, 0, -1
    whole = tracking(-1.0, 9.0, bundle=2).of(uneven)
    found = tracking(-1.0, 9.0, bundle=2, sharing="sum-mean").of(uneven)
    close(
        found,
        [float(whole[i] * s) for i, s in zip((0, 1, 2, 0, 1, 2), (2 / 3, 0.5, 1 / 3, 1 / 3, 0.5, 2 / 3), strict=True)],
    )


def test_shares_are_bounded() -> None:
    batch = rewarded([1.0, 0.0], [0.0, 1.02])  # over the means 0.5 and -0.51: shares of -50 and 51
    whole = tracking(-1.0, 9.0, bundle=2).of(batch)
    found = tracking(-1.0, 9.0, bundle=2, sharing="sum-mean").of(batch)
    close(found, [float(whole[0]) * -5, float(whole[1]) * -5, float(whole[2]) * 5, float(whole[3]) * 5])


def test_a_bundle_without_variance_is_not_blown_up() -> None:
    batch = rewarded([0, 0, 0], [0, 0, 0])
    found = tracking(2.0, 4.0, bundle=2).of(batch)
    close(found, [-1.5 * 2 / 0.2 / 2.5] * 6)  # -6, not -6 million
    assert bool((part(bundle=2, mode="batch").of(batch) == 0).all())


def test_one_completion_a_prompt() -> None:
    found = tracking(2.0, 4.0, bundle=2).of(rewarded([1], [0]))
    close(found, [-1.5 * 1 / 0.2 / 2.5] * 2)


def test_surplus_completions_have_no_credit() -> None:
    found = tracking(3.0, 4.0, bundle=2).of(rewarded([1, 0, 1, 1], [1, 1]))
    assert bool((found[[2, 3]] == 0).all())
    assert bool((found[[0, 1, 4, 5]] != 0).all())


def test_credit_goes_by_paper_not_by_prompt() -> None:
    # completions of one prompt with equal rewards earn differently, by what stands beside them
    found = tracking(1.0, 1.5, bundle=2).of(rewarded([0, 0], [1, 0]))
    assert found[0] != found[1]


# -- quantiles -------------------------------------------------------------------------------------------------------


def test_the_first_step_starts_from_its_own_quantiles_and_later_ones_use_those_of_before() -> None:
    made = part(bundle=2, rate=0.1)
    made.of(TWO)
    first = quantiles(torch.tensor([2.0, 1.0, 0.0, 1.0]), LEVELS).tolist()
    assert made.tracked == pytest.approx(first)
    other = rewarded([1, 1, 1, 1], [1, 1, 1, 0])
    same = tracking(0.0, 0.0, bundle=2)
    same.tracked = list(first)
    expected = same.of(other)
    close(made.of(other), expected.tolist())
    below = [sum(s < q for s in (2, 2, 2, 1)) / 4 for q in first]
    assert made.tracked == pytest.approx([q + 0.1 * (a - b) for q, a, b in zip(first, LEVELS, below, strict=True)])


def test_modes() -> None:
    own = quantiles(torch.tensor([2.0, 1.0, 0.0, 1.0]), (0.2, 0.8)).tolist()
    kept = (0.5, 1.9)
    mixed = [(a + b) / 2 for a, b in zip(own, kept, strict=True)]
    for mode, expected in (("batch", own), ("track", kept), ("mix", mixed)):
        found = tracking(*kept, bundle=2, mode=mode).of(TWO)
        reference = tracking(*expected, bundle=2).of(TWO)
        close(found, reference.tolist())


def test_a_smaller_last_bundle_goes_by_itself() -> None:
    made = tracking(0.5, 1.5, bundle=2)
    before = list(made.tracked)
    alone = rewarded([1, 0, 0, 1])
    both = rewarded([1, 0, 0, 1], [1, 1, 0, 0], [1, 0, 0, 1])
    found = made.of(both)
    close(found[8:], part(bundle=1, mode="batch").of(alone).tolist())
    only = tracking(0.5, 1.5, bundle=2)
    only.of(TWO)
    assert made.tracked == only.tracked != before  # the scores of one prompt are not those of two


def test_unscored_completions_do_not_reach_the_quantiles() -> None:
    made = tracking(0.5, 1.5, bundle=1)
    found = made.of(rewarded([1, float("nan")], [1, 0]))
    assert bool(found[:2].isnan().any())  # the update is skipped
    assert all(q == q for q in made.tracked)


def test_state_is_json() -> None:
    made = part(bundle=2)
    made.of(TWO)
    other = part(bundle=2)
    other.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert other.tracked == made.tracked
    close(other.of(TWO), made.of(TWO).tolist())


def test_arguments_that_make_no_sense() -> None:
    for wrong in (
        {"alpha": 0.9},
        {"beta": 1.0},
        {"bundle": 0},
        {"mode": "tracked"},
        {"sharing": "sum"},
        {"tail": "top"},
    ):
        with pytest.raises(PosttrainError, match="expected"):
            part(**wrong)
