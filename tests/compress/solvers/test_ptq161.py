"""PTQ1.61: its formula by hand, the limits of card 032, what training and restoring gain on a tiny model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.compress.grids.binary import Binary
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.packed.mixed import MixedColumns
from posttrain.compress.packed.planes import BinaryWeight
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.compress.solvers.ptq161 import SalientAndBinary, SalientColumns, salient_columns, share_of
from posttrain.compress.solvers.reconstruct import Seen
from posttrain.compress.solvers.restorative import Restoration, restored
from posttrain.compress.solvers.rtn import RoundToNearest, rounded
from posttrain.trajectory import PosttrainError
from tiny_blocks import compressed, divergence, floats, logits, text, tiny, walk, weights

pytestmark = pytest.mark.limit("ptq1.61")
ROWS = Uniform(4, 0, "integer")


def normal(rows: int = 12, columns: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def soft(weight: Tensor, salient: Tensor, **options: Any) -> SalientColumns:
    return SalientColumns(weight, salient, ROWS, **{"rate": 5e-4, "vector_rate": 1e-3, **options})


def some(columns: int = 32) -> Tensor:
    return torch.arange(columns) % 5 == 1


# -- one layer ---------------------------------------------------------------------------------------------------------


def test_the_formula_by_hand() -> None:
    # columns 0 and 2 are binary: mean (1 + 3) / 2 = 2, signs -, +, mean size 2; column 1 rounds on the row's 4-bit grid
    weight = torch.tensor([[1.0, -5.0, 3.0]])
    made = soft(weight, torch.tensor([False, True, False]))
    grid = ROWS.fit(weight)
    assert made().tolist()[0] == pytest.approx([0.0, float(grid.rounded(weight[:, 1:2])), 4.0])
    with torch.no_grad():
        made.row.fill_(0.5)
        made.scale.fill_(1.0)
        made.column.copy_(torch.tensor([[1.5, 0.5]]))
    # 0.5 (1 x -1 + 2) 1.5 and 0.5 (1 + 2) 0.5
    assert made().tolist()[0][::2] == pytest.approx([0.75, 0.75])
    assert made.pack().dequantize().tolist()[0][::2] == pytest.approx([0.75, 0.75])


def test_all_columns_salient_is_rounding_to_nearest_a_row() -> None:
    held = soft(normal(), torch.ones(32, dtype=torch.bool)).pack()
    assert isinstance(held, UniformWeight)
    wanted = rounded(normal(), ROWS, "w")
    assert torch.equal(held.dequantize(), wanted.dequantize())
    assert held.counted_bits == wanted.counted_bits


@pytest.mark.parametrize("centred", [False, True])
def test_no_column_salient_is_the_binary_grid(centred: bool) -> None:
    held = soft(normal(), torch.zeros(32, dtype=torch.bool), centred=centred).pack()
    assert isinstance(held, BinaryWeight)
    assert torch.allclose(held.dequantize(), rounded(normal(), Binary(1, 0, centred), "w").dequantize(), atol=1e-3)


def test_the_range_of_a_row_is_that_of_all_its_columns() -> None:
    weight = normal()
    weight[:, 0] = 20.0  # not salient, but in the range
    found = soft(weight, some())()[:, some()]
    assert torch.allclose(found, ROWS.fit(weight).rounded(weight)[:, some()], atol=1e-6)


def test_what_training_sees_is_what_is_stored() -> None:
    made = soft(normal(), some())
    with torch.no_grad():
        for parameter in (made.scale, made.row, made.column):
            parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    assert torch.equal(made().detach(), made.pack().dequantize())


def test_a_product_is_that_of_the_weight() -> None:
    made, x = soft(normal(), some()), normal(5, 32, 3)
    with torch.no_grad():
        for parameter in (made.scale, made.row, made.column):
            parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    wanted = x @ made().T
    assert torch.allclose(made.product(x), wanted, atol=1e-5)
    learned = (made.scale, made.row, made.column)
    one, other = (torch.autograd.grad((y**2).sum(), learned, retain_graph=True) for y in (made.product(x), wanted))
    for a, b in zip(one, other, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_balance_of_row_and_column_factors_does_not_matter() -> None:
    one, other = soft(normal(), some()), soft(normal(), some())
    with torch.no_grad():
        other.row.mul_(8.0)
        other.column.div_(8.0)
    assert torch.equal(one().detach(), other().detach())


@pytest.mark.parametrize("name", ["scale", "row"])
def test_it_is_linear_in_what_is_learned(name: str) -> None:
    made = soft(normal(), some())
    parameter = getattr(made, name)

    def at(share: float) -> Tensor:
        with torch.no_grad():
            kept = parameter.clone()
            parameter.copy_(kept * (1 + share * (1 + torch.arange(12.0)[:, None] / 12)))
            found = made().detach()
            parameter.copy_(kept)
        return found

    assert torch.allclose(at(1.0) - at(0.0), 2 * (at(0.5) - at(0.0)), atol=5e-3)
    columns = made()
    columns.square().sum().backward()
    assert all(p.grad is not None for p in (made.scale, made.row, made.column))


def test_zeros_are_left_out_of_the_mean_and_are_no_third_value() -> None:
    made = soft(torch.tensor([[0.0, 0.0, 1.0, 3.0]]), torch.zeros(4, dtype=torch.bool))
    assert made.mean.item() == 2.0
    found = made().detach()[0]
    assert found.tolist() == [0.0, 0.0, 0.0, 4.0]  # 2 -+ 2
    empty = soft(torch.zeros(2, 4), torch.zeros(4, dtype=torch.bool))
    assert (empty().detach() == 0).all()


def test_the_salient_columns_are_those_of_the_card() -> None:
    peaks = torch.tensor([3.0, 9.0, 1.0, 7.0, 5.0, 2.0, 8.0, 4.0, 6.0, 0.5])
    assert salient_columns(peaks, 0.2).nonzero()[:, 0].tolist() == [1, 3, 6]  # floor(0.2 x 10) + 1
    assert not salient_columns(peaks, 0.0).any()
    assert salient_columns(peaks, 1.0).all()
    assert salient_columns(torch.rand(1000, generator=torch.Generator().manual_seed(0)), share_of(1.6, 4)).sum() == 201


def test_bits_are_those_of_the_card() -> None:
    weight, peaks = normal(2048, 1024), torch.arange(1024.0)
    held = soft(weight, salient_columns(peaks, 0.2)).pack()
    assert isinstance(held, MixedColumns)
    assert held.stored_bytes * 8 == pytest.approx(held.counted_bits, rel=0.03)
    assert held.bits_per_weight == pytest.approx(1.6 + 52 / 1024 + 17 / 2048, abs=0.01)
    # 4096 x 4096, by the same formula: 1.61 to 1.62
    a_row = 0.2 * 4 + 0.8 + (16 + 4 + 16 + 16) / 4096
    assert 1.61 < a_row + (0.8 * 16 + 1) / 4096 < 1.62


def test_shares_of_bits() -> None:
    assert share_of(1.6, 4) == pytest.approx(0.2)
    assert share_of(2, 4) == pytest.approx(1 / 3)
    assert (share_of(1, 4), share_of(4, 4)) == (0.0, 1.0)
    with pytest.raises(PosttrainError, match="bits is 5; expected 1 to 4"):
        share_of(5, 4)


def test_columns_chosen_by_activation_lose_less_than_others() -> None:
    """Card 032's layer: 96 x 128, six input channels eight times the others."""
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(96, 128, generator=draw), torch.randn(512, 128, generator=draw)
    x[:, [5, 20, 47, 77, 90, 111]] *= 8
    few = 0.2 * 128

    def error(salient: Tensor) -> float:
        found = soft(weight, salient)().detach()
        return float(((found - weight) @ x.T).norm() / (weight @ x.T).norm())

    by_peak = error(salient_columns(x.abs().amax(0), 0.2))
    by_norm = error(salient_columns(weight.norm(dim=0), 0.2))
    at_random = error(salient_columns(torch.rand(128, generator=draw), 0.2))
    binary = error(torch.zeros(128, dtype=torch.bool))
    assert few == 25.6
    assert binary == pytest.approx(0.605, abs=0.02)
    assert by_peak == pytest.approx(0.264, abs=0.02)
    assert by_peak < 0.8 * min(by_norm, at_random)
    assert max(by_norm, at_random) < binary


# -- blocks ------------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_card() -> None:
    y, other = normal(2 * 3, 8).view(2, 3, 8), normal(2 * 3, 8, 1).view(2, 3, 8)
    found = SalientAndBinary().loss(Seen(y), {"float": Seen(other), "prefix": Seen(y + 0.1)})
    cosines = [(F.normalize(y, dim=-1) * F.normalize(o, dim=-1)).sum(-1).mean() for o in (other, y + 0.1)]
    wanted = ((y - other) ** 2).mean() + 0.01 - sum(c.abs().log() for c in cosines)
    assert float(found) == pytest.approx(float(wanted), rel=1e-4)


def test_without_training_every_layer_is_what_the_formula_says_of_the_float_models_activations() -> None:
    batches, model = text(), tiny()
    blocks = list(walk(tiny(), batches))
    before = floats(model)
    found = weights(compressed(model, SalientAndBinary(epochs=0), batches))
    for block in blocks:
        moments = block.moments(list(block.linears), gram=False, calls=block.float_inputs)
        for name, met in moments.items():
            whole = f"{block.name}.{name}"
            wanted = soft(before[whole], salient_columns(met.absmax, 0.2))().detach()
            assert torch.allclose(found[whole], wanted, atol=1e-6), whole


def test_all_salient_and_none_of_a_model() -> None:
    found = weights(compressed(tiny(), SalientAndBinary(share=1.0, epochs=1)))
    wanted = weights(compressed(tiny(), RoundToNearest(ROWS)))
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    found = weights(compressed(tiny(), SalientAndBinary(share=0.0, epochs=0)))
    wanted = weights(compressed(tiny(), RoundToNearest(Binary(1, 0, centred=False))))
    assert all(torch.allclose(found[n], wanted[n], atol=1e-3) for n in wanted)


def test_salient_columns_and_training_each_lose_less() -> None:
    batches = text(4)
    truth = logits(tiny(), batches)

    def lost(**options: Any) -> float:
        return divergence(compressed(tiny(), SalientAndBinary(**options), batches), truth, batches)

    binary, salient = lost(share=0.0, epochs=0), lost(epochs=0)
    trained = lost(epochs=4, rate=5e-3, vector_rate=1e-2)
    assert salient < binary
    assert trained < 0.8 * salient


def test_a_layer_may_have_other_bits() -> None:
    from dataclasses import dataclass

    from posttrain.compress.allocate.allocation import Allocation

    @dataclass(frozen=True)
    class Two(Allocation):
        def bits(self, *given: Any) -> dict[str, float]:
            return {"model.layers.0.mlp.down_proj": 4.0}

    model = compressed(tiny(), SalientAndBinary(epochs=0), allocation=Two())
    held = model.get_submodule("model.layers.0.mlp.down_proj.weight")
    assert isinstance(held, UniformWeight)


def test_restoring_trains_the_compressed_model_and_leaves_float_weights() -> None:
    batches = text(4)
    model = tiny()
    before = floats(model)
    compressed_once = weights(compressed(tiny(), SalientAndBinary(epochs=0), batches))
    way = walk(model, batches)
    solver = SalientAndBinary(epochs=0)
    nothing: Any = lambda block: None  # noqa: E731
    restored(way, Restoration(1, rate=0.0), lambda w: solver.solve_model(w, nothing, nothing))
    after = floats(model)
    for name in before:  # at a rate of 0 what comes back is what the first compression gave
        assert torch.allclose(after[name], compressed_once[name], atol=1e-6)
    restored(way, Restoration(30, rank=4, rate=1e-2), lambda w: solver.solve_model(w, nothing, nothing))
    trained = floats(model)
    assert any(not torch.allclose(trained[n], after[n], atol=1e-3) for n in after)
    losses = []
    for state in (after, trained):
        fresh = tiny()
        for name, weight in state.items():
            fresh.get_submodule(name).weight.data.copy_(weight)  # type: ignore[union-attr, operator]
        losses.append(sum(float(fresh(labels=b["input_ids"], **b).loss) for b in batches))
    assert losses[1] < losses[0]


def test_a_whole_method_with_restoring() -> None:
    once = weights(compressed(tiny(), SalientAndBinary(epochs=1)))
    twice = weights(compressed(tiny(), SalientAndBinary(epochs=1, restoration=Restoration(3, rank=4, rate=1e-2))))
    assert set(once) == set(twice)
    assert any(not torch.equal(once[n], twice[n]) for n in once)


def test_what_there_is_not() -> None:
    with pytest.raises(PosttrainError, match="expected 0 to 1"):
        SalientAndBinary(share=1.5)
    with pytest.raises(PosttrainError, match="expected group 0, zero integer"):
        SalientAndBinary(Uniform(4, 64))
    with pytest.raises(PosttrainError, match="expected at least 1 of each"):
        Restoration(0)
