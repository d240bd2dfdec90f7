"""CBQ's exact limits, its loss, and the split of outliers."""

from __future__ import annotations

import itertools

import pytest
import torch

from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.solvers.adaround import BlockRounding, Commitment, LearnedRounding, logits_of
from posttrain.compress.solvers.cbq import CrossBlock, hidden_distance, reserved_limit, truncated
from posttrain.compress.solvers.learned import fitted
from posttrain.compress.solvers.reconstruct import Reconstruction
from posttrain.compress.solvers.rtn import RoundToNearest
from tiny_blocks import GROUP, compressed, divergence, logits, text, tiny, weights

GRID = Uniform(2, GROUP, "integer", "mse")


def test_one_block_at_a_time_and_no_training_is_rounding_to_nearest() -> None:
    wanted = weights(compressed(tiny(), RoundToNearest(GRID)))
    for window, overlap in ((1, 0), (2, 1)):
        solver = CrossBlock(GRID, 0, window=window, overlap=overlap, truncate=False)
        found = weights(compressed(tiny(), solver))
        assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_full_rank_with_a_fixed_step_is_learned_rounding_of_blocks() -> None:
    """Rank 0 learns each logit: with one block a window and its loss it is BRECQ on the same inputs."""

    class Plain(CrossBlock):
        loss = Reconstruction.loss

    commitment = Commitment()
    cross = Plain(GRID, 3, rank=0, rate=0.2, step_rate=0.0, commitment=commitment, hard=False, truncate=False)
    single = BlockRounding(GRID, 3, targets=("prefix",), rate=0.2, commitment=commitment)
    found, wanted = weights(compressed(tiny(), cross)), weights(compressed(tiny(), single))
    near = weights(compressed(tiny(), RoundToNearest(GRID)))
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert any(not torch.equal(found[n], near[n]) for n in near)


def test_low_rank_logits_are_those_of_the_fraction_plus_a_product() -> None:
    torch.manual_seed(0)
    weight, grid = torch.randn(6, 32), Uniform(3, 16)
    scale, zero = fitted(weight, grid, "w")
    made = LearnedRounding(weight, scale, zero, 3, "integer", rate=0.1, commitment=Commitment(), rank=2, step_rate=0.1)
    torch.nn.init.normal_(made.down)
    place = weight / scale.repeat_interleave(16, 1)
    wanted = logits_of(place - place.floor()) + made.up @ made.down
    torch.testing.assert_close(made._logits(made.scale()), wanted, atol=1e-4, rtol=1e-4)
    codes = (place.floor() + (wanted >= 0) + zero.repeat_interleave(16, 1)).clamp(0, 7).long()
    assert torch.equal(made.pack().unpacked().long(), codes)  # type: ignore[operator]


def test_hard_training_sees_what_is_stored_with_the_soft_gradient() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 16)
    scale, zero = fitted(2 * weight, Uniform(3, 0), "w")  # so that no weight is clipped, rounded up or down
    arguments = {"rate": 0.1, "commitment": Commitment(), "rank": 2, "step_rate": 0.1}
    hard = LearnedRounding(weight, scale, zero, 3, "integer", hard=True, **arguments)  # type: ignore[arg-type]
    soft = LearnedRounding(weight, scale, zero, 3, "integer", **arguments)  # type: ignore[arg-type]
    soft.load_state_dict(hard.state_dict())
    assert torch.equal(hard().detach(), hard.pack().dequantize())
    one, other = (torch.autograd.grad(m().sum(), m.down)[0] for m in (hard, soft))
    assert float(other.abs().max()) > 0
    torch.testing.assert_close(one, other)


def test_the_fraction_follows_a_learned_step() -> None:
    """A weight at 2.99 steps must not jump by a step when the step shrinks a little and it is at 3.01."""
    weight, scale, zero = torch.tensor([[2.99, 0.0, -1.0]]), torch.ones(1, 1), torch.ones(1, 1)
    made = LearnedRounding(weight, scale, zero, 3, "integer", rate=0.1, commitment=Commitment(), rank=1, step_rate=0.1)
    for factor in (1.0, 0.99):
        made.factor.data.fill_(factor)
        assert made()[0, 0].item() == pytest.approx(2.99, abs=2e-3)


def test_the_distance_of_hidden_states() -> None:
    torch.manual_seed(0)
    found, wanted = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    p, q = wanted.softmax(-1), found.softmax(-1)
    kl = (p * (p / q).log()).sum(-1).mean()
    squared = ((found - wanted) ** 2).sum(-1).mean()
    assert hidden_distance(found, wanted, 3.0).item() == pytest.approx(float(squared + 3 * kl), rel=1e-5)
    assert hidden_distance(wanted, wanted).item() == pytest.approx(0.0, abs=1e-6)


def test_the_split_isolates_exactly_what_was_planted() -> None:
    """Card 147: N(0, 1) with 0.1 % of its values at 20 in size."""
    torch.manual_seed(0)
    weight = torch.randn(100, 100)
    planted = torch.randperm(10_000)[:10]
    weight.view(-1)[planted] = torch.tensor([20.0, -20.0]).repeat(5)
    limit = reserved_limit(weight.abs())
    rest = weight.abs().flatten()[weight.abs().flatten() < 19]
    assert limit == pytest.approx(float(rest.max()))
    cut = truncated(weight)
    assert torch.equal((cut != weight).flatten().nonzero()[:, 0], planted.sort().values)
    assert cut.abs().max().item() == pytest.approx(limit)


def test_the_split_by_trying_every_one() -> None:
    torch.manual_seed(1)
    values = torch.cat([torch.rand(40), torch.tensor([3.0, 3.1, 3.3, 6.0, 6.4])]).double()
    first, third = values.quantile(0.25), values.quantile(0.75)
    limit = third + 1.5 * (third - first)
    found = values[values > limit].sort().values
    best, wanted = -torch.inf, 0.0
    for i in range(len(found) + 1):
        reserved, outlying = found[:i], found[i:]
        top = reserved.max() if i else limit
        between = (outlying.min() - top) ** 2 if len(outlying) else torch.tensor(0.0)
        within = reserved.var(unbiased=False) if i else torch.tensor(0.0)
        if float(between - within) > best:
            best, wanted = float(between - within), float(top)
    assert reserved_limit(values) == pytest.approx(wanted)


def test_without_outliers_nothing_is_cut() -> None:
    for values in (torch.linspace(0, 1, 50), torch.ones(10), torch.zeros(4)):
        assert reserved_limit(values) >= float(values.max()) - 1e-9


def test_the_teacher_keeps_what_is_cut_off() -> None:
    model, batches = tiny(), text(1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 30.0  # type: ignore[union-attr, index]
    solver = CrossBlock(GRID, 0)
    truth, seen = logits(model, batches), {}

    class Spy(CrossBlock):
        def _lessons(self, opened, known):  # type: ignore[no-untyped-def]
            seen.setdefault("before", opened[0].block.before.mlp.up_proj.weight[0, 0].item())
            return super()._lessons(opened, known)

    compressed(model, Spy(GRID, 0), batches)
    assert seen["before"] == 30.0
    assert weights(model)["model.layers.0.mlp.up_proj"].abs().max() < 20
    assert solver.keeps_float and truth.isfinite().all()  # noqa: PT018


@pytest.mark.parametrize(("window", "overlap"), [(1, 0), (2, 1)])
def test_training_loses_less_than_its_start(window: int, overlap: int) -> None:
    batches = text(8)
    truth = logits(tiny(), batches)
    options = {"window": window, "overlap": overlap, "rank": 0, "rate": 0.05, "step_rate": 0.005, "truncate": False}
    loss = {
        epochs: divergence(compressed(tiny(), CrossBlock(GRID, epochs, **options), batches), truth, batches)  # type: ignore[arg-type]
        for epochs in (0, 4)
    }
    assert loss[4] < 0.9 * loss[0]


def test_what_is_random_follows_from_the_seed() -> None:
    solver = CrossBlock(GRID, 2, window=2, overlap=1)
    one, other = (weights(compressed(tiny(), solver)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))
    assert len({tuple(w.shape) for w in itertools.chain(one.values())}) > 1


def test_a_normal_weight_keeps_its_tails_and_an_outlier_is_cut() -> None:
    weight = torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(truncated(weight), weight)
    weight[3, 5] = 9.0
    cut = truncated(weight)
    assert float(cut[3, 5]) < 5
    assert torch.equal(cut.flatten()[torch.arange(40_000) != 605], weight.flatten()[torch.arange(40_000) != 605])
