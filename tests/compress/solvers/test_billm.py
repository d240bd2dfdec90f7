"""BiLLM: its pieces by hand and by brute force, errors that stay out of their block, what is stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from posttrain.compress.grids.binary import Binary, binarised
from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.mixed import MixedColumns
from posttrain.compress.packed.planes import BinaryWeight
from posttrain.compress.packed.table import OwnTables
from posttrain.compress.solvers.billm import QUANTILES, BiLLM, Binarised, split, twice_loss
from posttrain.compress.solvers.gptq import inverse_factor
from posttrain.compress.solvers.rtn import rounded
from posttrain.trajectory import PosttrainError

pytestmark = pytest.mark.limit("billm")


def normal(rows: int = 32, columns: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def moments(x: Tensor) -> InputMoments:
    found = InputMoments(x.shape[1])
    found.add(x)
    return found


def test_the_loss_of_binarising_twice_is_what_two_planes_leave() -> None:
    weight = normal()
    left = weight - weight.mean(1, keepdim=True)
    first = left - left.abs().mean(1, keepdim=True) * torch.where(left >= 0, 1.0, -1.0)
    mean = first.mean(1, keepdim=True)
    second = first - mean
    second = second - second.abs().mean(1, keepdim=True) * torch.where(second >= 0, 1.0, -1.0)
    assert float(twice_loss(weight)) == pytest.approx(float((second**2).sum()), rel=1e-5)
    stored = Binary(bits=2).fit(weight).rounded(weight)
    assert float(((stored - weight) ** 2).sum()) == pytest.approx(float((second**2).sum()), rel=0.02)


def test_the_split_is_the_best_of_81_quantiles() -> None:
    weight, absent = normal(8, 40), 10
    counted = torch.cat([weight.abs().flatten(), torch.zeros(absent * 8)])
    losses = []
    for size in torch.quantile(counted, QUANTILES):
        loss = 0.0
        for row in weight:
            for part in (row[row.abs() < size], row[row.abs() >= size]):
                if len(part):
                    mean = part.mean()
                    away = part - mean
                    loss += float(((away.abs() - away.abs().mean()) ** 2).sum())
        losses.append((loss, float(size)))
    best = min(losses)[1]
    assert torch.equal(split(weight, absent), weight.abs() < best)


def test_a_block_by_hand() -> None:
    # no salient column; the parts {0.5, 1} and {-3, 5} of the row: 0.75 -+ 0.25 and 1 -+ 4
    weight = torch.tensor([[0.5, 1.0, -3.0, 5.0]])
    made = Binarised.of(weight, torch.zeros(4, dtype=torch.bool), weight.abs() < 2)
    assert made.values.tolist() == [[0.5, 1.0, -3.0, 5.0]]
    assert made.codes.tolist() == [[0, 1, 2, 3]]
    made = Binarised.of(weight, torch.tensor([False, False, True, True]), torch.ones(1, 2, dtype=torch.bool))
    assert made.values.tolist() == [[0.5, 1.0, -3.0, 5.0]]
    assert (made.levels.offset.item(), made.levels.scale.tolist()) == (1.0, [[4.0, 0.0]])


def test_the_number_of_salient_columns_is_that_which_loses_least() -> None:
    weight = normal(16, 24)
    weight[:, 3] *= 6
    weight[:, 17] *= 5
    solver = BiLLM(block=24, salient=20)
    made = solver.binarised(weight, torch.ones(24))
    order = (weight**2).sum(0).argsort(descending=True)
    losses = [
        float(((Binary(bits=2).fit(part).rounded(part) - part) ** 2).sum())
        for k in range(1, 21)
        for part in (weight[:, order[:k]], weight[:, order[k:]])
    ]
    sums = [a + b for a, b in zip(losses[::2], losses[1::2], strict=True)]
    assert abs(int(made.salient.sum()) - (1 + sums.index(min(sums)))) <= 1  # scales in half precision may tie
    assert made.salient[3]
    assert made.salient[17]
    large = torch.ones(24)
    large[3] = 100.0  # of little weight in H: not salient however large
    assert not solver.binarised(weight, large).salient[3]


def test_errors_go_to_later_blocks_alone() -> None:
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(2)) @ normal(8, 64) + 0.3 * normal(200, 64, 5)
    weight, solver = normal(12, 64), BiLLM(block=32)
    found = solver.solve(weight, moments(x), None, "w").dequantize()
    factor = inverse_factor(moments(x).hessian, 0.01, "w")
    first = solver.binarised(weight[:, :32], factor.diag()[:32]).values
    errors = (weight[:, :32] - first) / factor.diag()[:32]
    rest = weight[:, 32:] - errors @ factor[:32, 32:]
    second = solver.binarised(rest, factor.diag()[32:]).values
    assert torch.allclose(found, torch.cat([first, second], 1), atol=1e-4)


def test_of_uncorrelated_inputs_blocks_do_not_know_of_each_other() -> None:
    weight, solver = normal(12, 64), BiLLM(block=32, damping=0.0)
    found = solver.solve(weight, moments(torch.eye(64) * 8), None, "w").dequantize()
    parts = [solver.binarised(part, torch.ones(32)).values for part in weight.split(32, 1)]
    assert torch.allclose(found, torch.cat(parts, 1), atol=1e-5)


@pytest.mark.parametrize("columns", [256, 192])
def test_what_is_stored_and_its_size(columns: int) -> None:
    weight, x = normal(64, columns), normal(400, columns, 1)
    held = BiLLM().solve(weight, moments(x), None, "w")
    assert isinstance(held, MixedColumns)
    once, twice = held.parts
    assert isinstance(once, OwnTables)
    assert isinstance(twice, BinaryWeight)
    assert 2 <= twice.shape[1] <= 2 * 49
    assert held.stored_bytes * 8 == pytest.approx(held.counted_bits, rel=0.03)
    assert held.bits_per_weight == pytest.approx(2 + 112 * 2 / columns, rel=0.04)  # and masks, of 64 rows


def test_it_loses_less_than_one_plane_and_more_than_none() -> None:
    weight, x = normal(32, 128), normal(400, 128, 1)
    x = x @ torch.diag(torch.logspace(-1, 1, 128))
    held = BiLLM().solve(weight, moments(x), None, "w").dequantize()
    plane = rounded(weight, Binary(1, 128), "w").dequantize()
    errors = [float((((w - weight) @ x.T) ** 2).sum()) for w in (held, plane)]
    assert 0 < errors[0] < 0.5 * errors[1]


def test_the_searches_may_look_at_the_saliency() -> None:
    weight, x = normal(32, 64), normal(200, 64, 1) @ torch.diag(torch.logspace(-1, 1, 64))
    held = BiLLM(searched="saliency").solve(weight, moments(x), None, "w")
    assert torch.isfinite(held.dequantize()).all()
    with pytest.raises(PosttrainError, match="expected weights or saliency"):
        BiLLM(searched="both")  # type: ignore[arg-type]


def test_a_layer_cannot_have_other_bits() -> None:
    with pytest.raises(PosttrainError, match="BiLLM has one size"):
        BiLLM().solve(normal(), moments(normal(200, 64)), 3.0, "w")


def test_binarised_rows_without_weights() -> None:
    mean, scale = binarised(torch.ones(1, 3), torch.zeros(1, 3))
    assert (mean.item(), scale.item()) == (0.0, 0.0)
