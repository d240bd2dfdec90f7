"""Drawing is exact: the kept tokens and their log-probabilities are those of `transformers`' own warpers, and every
token's share of the unit interval is its probability.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from posttrain.rollout import sampling as module
from posttrain.rollout.sampling import BLOCK, draw
from posttrain.trajectory import PosttrainError, Sampling

NO_TOKENS = torch.LongTensor()  # the warpers look at scores alone
LARGEST = 1 - 2.0**-53  # the largest number that `random()` returns
SETTINGS = [
    Sampling(temperature=t, top_k=k, top_p=p, min_p=m)
    for t, k, p, m in itertools.product((1.0, 0.6, 1.7), (0, 1, 5), (1.0, 0.8), (0.0, 0.1))
]


def warped(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Log-probabilities after the warpers of `transformers`, in the order in which `generate` applies them."""
    warpers = LogitsProcessorList()
    if sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers(NO_TOKENS, logits).log_softmax(-1)


def sweep(row: torch.Tensor, sampling: Sampling, points: int = 4096):
    """Draw from one row of logits with a grid of uniform numbers, at the middle of each cell."""
    uniform = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    return draw(row.expand(points, -1), uniform, sampling)


def example(vocabulary: int, seed: int = 0, rows: int = 4) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def test_generate_applies_its_warpers_in_the_order_assumed_here():
    from transformers import GenerationConfig, GenerationMixin

    config = GenerationConfig(do_sample=True, temperature=0.5, top_k=3, top_p=0.5, min_p=0.1)
    found = GenerationMixin._get_logits_processor(cast(Any, GenerationMixin()), config)
    kinds = [type(p) for p in found]
    assert kinds == [TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper]


@pytest.mark.parametrize("vocabulary", [7, BLOCK, 700])
@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_kept_tokens_and_log_probabilities_are_those_of_transformers(sampling, vocabulary):
    for row in example(vocabulary):
        expected = warped(row[None], sampling)[0]
        full = (row / sampling.temperature).log_softmax(-1)
        found = sweep(row, sampling, points=2048)
        torch.testing.assert_close(found.logp, expected[found.token], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.logp_full, full[found.token], atol=1e-5, rtol=1e-5)
        likely = (expected.exp() > 2 / 2048).nonzero()[:, 0]
        assert set(likely.tolist()) <= set(found.token.tolist())


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
@pytest.mark.parametrize("candidates", [(), (2, 8), (64, 512, 4096)])
def test_how_many_candidates_are_looked_at_changes_nothing(sampling, candidates, monkeypatch):
    """The same tokens from two likely ones at first, as from the sorted vocabulary; and from one row as from four."""
    logits, uniform = example(300), torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(module, "CANDIDATES", ())
    expected = draw(logits, uniform, sampling)
    monkeypatch.setattr(module, "CANDIDATES", candidates)
    found = draw(logits, uniform, sampling)
    assert torch.equal(found.token, expected.token)
    torch.testing.assert_close(found.logp, expected.logp, atol=1e-6, rtol=0)
    for row in range(4):
        assert int(draw(logits[row : row + 1], uniform[row : row + 1], sampling).token) == int(expected.token[row])


@pytest.mark.parametrize("vocabulary", [3, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.5), Sampling(top_k=4), Sampling(top_p=0.7)])
def test_the_measure_of_each_token_is_its_probability(sampling, vocabulary):
    """Counts over a grid of N points differ by less than two from N p for an interval; no statistics needed."""
    points = 20_000
    row = example(vocabulary, seed=vocabulary)[0]
    probability = warped(row[None], sampling)[0].double().exp()
    found = sweep(row, sampling, points)
    count = torch.bincount(found.token, minlength=vocabulary)
    assert float((count - points * probability).abs().max()) < 2
    changes = int((found.token[1:] != found.token[:-1]).sum())
    assert changes == len(found.token.unique()) - 1  # one interval a token


def test_bounds_of_the_intervals_are_exact():
    probability = torch.tensor([0.25, 0.0, 0.5, 0.25, 0.0])
    for u, token in [(0, 0), (0.25 - 1e-9, 0), (0.25 + 1e-9, 2), (0.75 - 1e-7, 2), (0.75 + 1e-7, 3), (LARGEST, 3)]:
        found = draw(probability.log()[None], torch.tensor([u], dtype=torch.float64), Sampling())
        assert int(found.token) == token, u


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.999), Sampling(temperature=2.0)], ids=str)
def test_the_last_of_the_interval_goes_to_a_token_that_may_be_drawn(sampling):
    """Sums of fp32 round up as often as down, so the largest number may lie past the last cumulative probability."""
    draws = torch.Generator().manual_seed(0)
    forbidden = torch.full((500, 60), -math.inf)
    logits = torch.cat([3 * torch.randn(500, 40, generator=draws), forbidden], 1)
    found = draw(logits, torch.full((500,), LARGEST, dtype=torch.float64), sampling)
    assert int(found.token.max()) < 40
    assert bool(torch.isfinite(found.logp).all())


ORDINARY = st.floats(-30, 30, width=32)
EXTREME = st.sampled_from([-math.inf, -3e38, 3e38, 0.0, 1e-30, 88.0, -104.0, 1e4])


@settings(deadline=None, max_examples=300)
@given(
    row=st.sampled_from([ORDINARY, EXTREME, ORDINARY | EXTREME])
    .flatmap(lambda kind: st.lists(kind, min_size=1, max_size=40))
    .filter(lambda r: max(r) > -math.inf),
    pad=st.sampled_from([0, BLOCK - 20, 2 * BLOCK]),
    u=st.sampled_from([0.0, LARGEST, 0.5, 2.0**-60]) | st.floats(0, LARGEST),
    temperature=st.sampled_from([1e-3, 0.3, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 3, 1000]),
    top_p=st.sampled_from([1e-6, 0.5, 0.999999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-9, 0.5, 1.0]),
)
def test_never_a_token_of_probability_zero(row, pad, u, temperature, top_k, top_p, min_p):
    logits = torch.tensor([[-math.inf] * pad + row + [-math.inf] * pad])
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    found = draw(logits, torch.tensor([u], dtype=torch.float64), sampling)
    token = int(found.token)
    assert 0 <= token < logits.shape[1]
    assert float(logits[0, token]) > -math.inf
    assert -200 < float(found.logp) <= 1e-6  # exp of it is not zero even in the smallest fp32
    assert float(found.logp_full) <= float(found.logp) + 1e-5
    if min_p == 1 or top_k == 1 or top_p == 1e-6:
        assert float(logits[0, token]) == pytest.approx(float(logits.max()), rel=1e-6)


def test_equal_logits_stay_or_go_together():
    row = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0])
    assert set(sweep(row, Sampling(top_k=2)).token.tolist()) == {1, 2, 3}
    assert set(sweep(row, Sampling(top_p=0.1)).token.tolist()) == {1, 2, 3}
    assert set(sweep(row, Sampling(min_p=1.0)).token.tolist()) == {1, 2, 3}
    assert torch.isfinite(warped(row[None], Sampling(top_k=2)))[0].tolist() == [False, True, True, True, False]


def test_greedy_takes_the_likeliest_with_probability_one():
    logits = example(300)
    found = draw(logits, torch.rand(4, dtype=torch.float64), Sampling(temperature=0, top_k=3, top_p=0.5))
    assert torch.equal(found.token, logits.argmax(-1))
    assert found.logp.tolist() == [0.0] * 4
    torch.testing.assert_close(found.logp_full, logits.log_softmax(-1).amax(-1))


def test_the_logits_given_are_not_changed():
    logits = example(50)
    before = logits.clone()
    for sampling in SETTINGS:
        draw(logits, torch.zeros(4, dtype=torch.float64), sampling)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0, 0.5, 1])
def test_logits_that_are_no_numbers_are_an_error(bad, temperature):
    logits = example(50)
    logits[2] = bad
    with pytest.raises(PosttrainError, match="not finite numbers"):
        draw(logits, torch.zeros(4, dtype=torch.float64), Sampling(temperature=temperature))
