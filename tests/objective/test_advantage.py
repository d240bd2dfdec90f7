from __future__ import annotations

import math

import pytest
import torch
from flat_batches import ragged
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from posttrain.objective.advantage import (
    GAE,
    Advantage,
    DecoupledGroupNormalised,
    Demonstration,
    Fixed,
    GroupNormalised,
    LeaveOneOut,
    Return,
    WhitenedReturn,
    group_mean,
    group_std,
    to_go,
    whitened,
)
from posttrain.objective.batch import Batch

REWARDS = st.lists(
    st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=6), min_size=1, max_size=4
)  # groups of unequal size, some of one

SHAPES = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=3)


def rewarded(rewards: list[list[float]]) -> Batch:
    """One token a completion."""
    return ragged([[1] * len(group) for group in rewards], rewards)


def of(advantage: Fixed, batch: Batch) -> Tensor:
    advantage.prepare(batch)
    return advantage.credit(batch, torch.zeros(batch.target.numel())).advantage


def test_group_statistics_by_hand() -> None:
    batch = rewarded([[1.0, 2.0, 6.0], [5.0]])
    mean, size = group_mean(batch.group, batch.reward)
    assert mean.tolist() == [3.0, 3.0, 3.0, 5.0]
    assert size.tolist() == [3.0, 3.0, 3.0, 1.0]
    # squares 4 + 1 + 9 = 14 over n - 1 = 2
    torch.testing.assert_close(group_std(batch.group, batch.reward), torch.tensor([math.sqrt(7)] * 3 + [0.0]))


def test_demonstrations_weigh_what_their_row_weighs() -> None:
    batch = ragged([[3], [2]])
    batch.weight = torch.tensor([1.0, 0.5])
    assert of(Demonstration(), batch).tolist() == [1.0, 1.0, 1.0, 0.5, 0.5]


def test_returns_and_their_baselines_by_hand() -> None:
    batch = ragged([[1, 2], [1]], [[1.0, 0.0], [5.0]])
    assert of(Return(), batch).tolist() == [1.0, 0.0, 0.0, 5.0]
    assert of(Return("batch"), batch).tolist() == [-1.0, -2.0, -2.0, 3.0]  # the mean over completions, not tokens
    assert of(Return("group"), batch).tolist() == [0.5, -0.5, -0.5, 0.0]


def test_group_normalised_by_hand() -> None:
    batch = ragged([[2, 1, 1], [1, 1]], [[1.0, 0.0, 0.0], [3.0, 1.0]])
    spread = math.sqrt((4 + 1 + 1) / 9 / 2) + 1e-4
    expected = [2 / 3 / spread] * 2 + [-1 / 3 / spread] * 2 + [1 / (math.sqrt(2) + 1e-4), -1 / (math.sqrt(2) + 1e-4)]
    torch.testing.assert_close(of(GroupNormalised(), batch), torch.tensor(expected))
    plain = of(GroupNormalised("none"), batch)
    torch.testing.assert_close(plain, torch.tensor([2 / 3, 2 / 3, -1 / 3, -1 / 3, 1.0, -1.0]))
    over_step = torch.tensor([1.0, 0.0, 0.0, 3.0, 1.0]).std() + 1e-4
    torch.testing.assert_close(of(GroupNormalised("batch"), batch), plain / over_step)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_without_variance_has_advantage_zero_exactly(scale: str) -> None:
    # in fp32 the mean of 0.1 + 0.1 + 0.1 differs from 0.1, and a division by 1e-4 would make a signal of it
    batch = rewarded([[0.1] * 3, [0.7] * 7, [1.0, 0.0], [-1e6] * 3])
    advantage = of(GroupNormalised(scale), batch)  # type: ignore[arg-type]
    undecided = torch.tensor([i not in (10, 11) for i in range(15)])
    assert bool((advantage[undecided] == 0).all())
    assert bool((advantage[~undecided] != 0).all())
    assert bool((of(LeaveOneOut(), batch)[undecided] == 0).all())
    assert bool((of(Return("group"), batch)[undecided] == 0).all())


def test_rewards_that_differ_by_rounding_alone_are_no_signal() -> None:
    batch = rewarded([[0.3, 0.1 + 0.2, 0.30000001192092896 + 3e-8]])
    assert bool((of(GroupNormalised(), batch) == 0).all())


def test_groups_of_one() -> None:
    batch = rewarded([[2.0], [3.0]])
    for scale in ("group", "batch", "none"):
        assert of(GroupNormalised(scale), batch).tolist() == [0.0, 0.0]
    assert of(LeaveOneOut(), batch).tolist() == [2.0, 3.0]  # nobody to compare with: REINFORCE without a baseline
    lone = rewarded([[2.0]])
    for advantage in (GroupNormalised("batch"), GroupNormalised(), DecoupledGroupNormalised(), WhitenedReturn(kl=0)):
        assert of(advantage, lone).tolist() == [0.0], advantage


@settings(deadline=None, max_examples=60)
@given(rewards=REWARDS)
def test_group_advantages_sum_to_zero(rewards: list[list[float]]) -> None:
    batch = rewarded([group for group in rewards if len(group) > 1] or [[0.0, 1.0]])
    for advantage in (GroupNormalised(), GroupNormalised("none"), GroupNormalised("batch"), LeaveOneOut()):
        found = of(advantage, batch)
        sums = torch.zeros(batch.groups).index_add(0, batch.group, found)
        torch.testing.assert_close(sums, torch.zeros(batch.groups), rtol=0, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(rewards=REWARDS)
def test_leave_one_out_is_the_mean_of_the_others_and_a_scaled_dr_grpo(rewards: list[list[float]]) -> None:
    batch = rewarded(rewards)
    found = of(LeaveOneOut(), batch).tolist()
    dr_grpo = of(GroupNormalised("none"), batch).tolist()
    at = 0
    for group in rewards:
        size = len(group)
        for i, reward in enumerate(group):
            others = sum(group[:i] + group[i + 1 :]) / max(1, size - 1)
            assert found[at] == pytest.approx(reward - others, abs=1e-5)
            if size > 1 and max(group) - min(group) > 1e-4:
                assert found[at] == pytest.approx(size / (size - 1) * dr_grpo[at], abs=1e-5)
            at += 1


@settings(deadline=None, max_examples=40)
@given(rewards=REWARDS, shift=st.floats(-4, 4, width=32), scale=st.floats(0.5, 4, width=32))
def test_group_normalised_ignores_shift_and_nearly_scale(
    rewards: list[list[float]], shift: float, scale: float
) -> None:
    moved = of(GroupNormalised(), rewarded([[r * scale + shift for r in g] for g in rewards]))
    plain = of(GroupNormalised(eps=1e-4 / scale), rewarded(rewards))
    wide = torch.tensor([max(g) - min(g) > 0.1 for g in rewards for _ in g])
    torch.testing.assert_close(moved[wide], plain[wide], rtol=1e-3, atol=1e-3)


def test_leave_one_out_penalises_divergence_in_the_reward() -> None:
    batch = ragged([[2, 1]], [[1.0, 0.0]])
    batch.old_logp = torch.tensor([-1.0, -2.0, -3.0])
    batch.reference_logp = torch.tensor([-1.5, -2.5, -1.0])
    # penalties: (0.5 + 0.5) and -2, times 0.5: rewards 0.5 and 1
    assert of(LeaveOneOut(kl=0.5), batch).tolist() == [-0.5, -0.5, 0.5]
    assert LeaveOneOut(kl=0.5).needs == {"old_logp", "reference_logp"}
    assert LeaveOneOut().needs == set()


def test_decoupled_normalisation_by_hand() -> None:
    batch = rewarded([[0.0, 0.0], [0.0, 0.0]])
    batch.rewards = {"big": torch.tensor([0.0, 100.0, 0.0, 0.0]), "small": torch.tensor([0.0, 0.0, 0.01, 0.0])}
    big, small = 50 / (math.sqrt(5000) + 1e-4), 0.005 / (math.sqrt(0.00005) + 1e-4)
    total = torch.tensor([-big, big, 2 * small, -2 * small])
    expected = (total - total.mean()) / (total.std() + 1e-4)
    torch.testing.assert_close(of(DecoupledGroupNormalised((("small", 2.0),)), batch), expected)


def test_decoupled_normalisation_of_one_reward_is_grpo_over_its_own_spread() -> None:
    batch = rewarded([[0.0, 1.0, 1.0], [2.0, 2.0]])
    single = of(GroupNormalised(), batch)
    torch.testing.assert_close(of(DecoupledGroupNormalised(), batch), (single - single.mean()) / (single.std() + 1e-4))


def test_a_component_that_a_completion_lacks_is_no_reward_of_zero() -> None:
    batch = rewarded([[0.0, 0.0, 0.0], [0.0, 0.0]])
    nan = float("nan")
    batch.rewards = {"a": torch.tensor([5.0, 7.0, nan, nan, nan]), "b": torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0])}
    one = 1 / (math.sqrt(2) + 1e-4)
    half = 0.5 / (math.sqrt(0.5) + 1e-4)
    total = torch.tensor([-one, one, 0.0, half, -half])
    expected = (total - total.mean()) / (total.std() + 1e-4)
    torch.testing.assert_close(of(DecoupledGroupNormalised(), batch), expected)


def test_whitened_return_by_hand() -> None:
    batch = ragged([[2], [1]], [[1.0], [3.0]])
    batch.old_logp = torch.tensor([-1.0, -2.0, -1.0])
    batch.reference_logp = torch.tensor([-2.0, -1.0, -1.5])
    # penalties 1, -1, 0.5: to go 0, -1, 0.5
    plain = of(WhitenedReturn(kl=0.1, whiten=False), batch)
    torch.testing.assert_close(plain, torch.tensor([1.0, 1.1, 2.95]))
    found = of(WhitenedReturn(kl=0.1), batch)
    torch.testing.assert_close(found, (plain - plain.mean()) / plain.std())
    torch.testing.assert_close(found.mean(), torch.tensor(0.0), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.var(), torch.tensor(1.0))
    batch = ragged([[1, 2], [1]], [[1.0, 0.0], [3.0]])
    assert of(WhitenedReturn(kl=0, baseline="group", whiten=False), batch).tolist() == [0.5, -0.5, -0.5, 0.0]
    assert WhitenedReturn(kl=0).needs == set()
    assert WhitenedReturn().needs == {"old_logp", "reference_logp"}


def test_a_penalty_without_its_signals_is_refused() -> None:
    with pytest.raises(RuntimeError, match="old and reference"):
        WhitenedReturn().prepare(rewarded([[1.0]]))
    with pytest.raises(RuntimeError, match="critic's values"):
        GAE(kl=0).prepare(rewarded([[1.0]]))
    with pytest.raises(RuntimeError, match="before prepare"):
        Return().credit(rewarded([[1.0]]), torch.zeros(1))


def test_whitening_equal_values_gives_zero_exactly() -> None:
    assert bool((whitened(torch.full((7,), 0.1)) == 0).all())
    assert whitened(torch.tensor([3.0])).tolist() == [0.0]


def test_to_go_by_hand() -> None:
    batch = ragged([[3, 1], [2]])
    found = to_go(batch, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    assert found.tolist() == [6.0, 5.0, 3.0, 4.0, 11.0, 6.0]


def test_gae_by_hand() -> None:
    batch = ragged([[3], [1]], [[1.0], [2.0]])
    batch.value = torch.tensor([0.5, 0.25, 0.75, 1.0])
    batch.token_reward = torch.tensor([0.0, 0.5, 0.0, 0.0])
    batch.old_logp = torch.tensor([-1.0, -1.0, -1.0, -2.0])
    batch.reference_logp = torch.tensor([-1.0, -2.0, -1.0, -1.0])
    # rewards: 0, 0.5 - 0.1, 1 and 2 + 0.1; deltas with gamma 0.5
    third = 1 - 0.75
    second = 0.4 + 0.5 * 0.75 - 0.25
    first = 0.0 + 0.5 * 0.25 - 0.5
    expected = [first + 0.4 * (second + 0.4 * third), second + 0.4 * third, third, 2.1 - 1.0]
    found = of(GAE(gamma=0.5, lam=0.8, kl=0.1, whiten=False), batch)
    torch.testing.assert_close(found, torch.tensor(expected))
    assert batch.returns is not None
    torch.testing.assert_close(batch.returns, torch.tensor(expected) + batch.value)


@settings(deadline=None, max_examples=30)
@given(
    groups=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_gae_without_critic_or_discount_is_the_reward_to_go(groups: list[list[int]], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    batch = ragged(groups, [[float(i) for i in range(len(g))] for g in groups])
    batch.value = torch.zeros(batch.target.numel())
    batch.token_reward = torch.randn(batch.target.numel(), generator=draw)
    found = of(GAE(gamma=1, lam=1, kl=0, whiten=False), batch)
    torch.testing.assert_close(found, batch.spread(batch.reward) + to_go(batch, batch.token_reward))


@settings(deadline=None, max_examples=30)
@given(length=st.integers(1, 8), seed=st.integers(0, 99))
def test_gae_limits(length: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    batch = ragged([[length]], [[1.5]])
    batch.value = torch.randn(length, generator=draw)
    rewards = torch.zeros(length)
    rewards[-1] = 1.5
    after = torch.cat([batch.value[1:], torch.zeros(1)])
    # lambda 0: the one-step error; lambda 1: the return minus the value
    torch.testing.assert_close(of(GAE(0.9, 0, kl=0, whiten=False), batch), rewards + 0.9 * after - batch.value)
    returns = 1.5 * 0.9 ** torch.arange(length - 1, -1, -1.0)
    torch.testing.assert_close(of(GAE(0.9, 1, kl=0, whiten=False), batch), returns - batch.value)
    assert batch.returns is not None
    torch.testing.assert_close(batch.returns, returns)


def test_gae_of_nothing_is_zero() -> None:
    # card 044: no reward, no penalty, no value: all advantages 0 before whitening, and after it
    batch = ragged([[3, 2]], [[0.0, 0.0]])
    batch.value = torch.zeros(5)
    assert bool((of(GAE(kl=0), batch) == 0).all())
    # a policy equal to the reference pays no penalty
    batch.old_logp = batch.reference_logp = torch.tensor([-1.0, -2.0, -3.0, -0.5, -4.0])
    assert bool((of(GAE(kl=0.5), batch) == 0).all())


def test_gae_whitens_the_advantage_but_not_the_returns() -> None:
    batch = ragged([[3], [2]], [[1.0], [0.0]])
    batch.value = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    plain, returns = of(GAE(kl=0, whiten=False), batch), batch.returns
    found = of(GAE(kl=0), batch)
    torch.testing.assert_close(found, (plain - plain.mean()) / plain.std())
    assert returns is not None
    assert batch.returns is not None
    torch.testing.assert_close(batch.returns, returns)


def test_needs() -> None:
    assert GAE().needs == {"value", "old_logp", "reference_logp"}
    assert GAE(kl=0).needs == {"value", "old_logp"}
    plain: list[Advantage] = [Demonstration(), Return(), GroupNormalised(), DecoupledGroupNormalised()]
    for advantage in plain:
        assert advantage.needs == set()
        assert not advantage.keep_groups
