"""Ranges by channel and by place: the card's formula by hand, dead channels, places that do not fit."""

from __future__ import annotations

import pytest
import torch

from posttrain.compress.activations.ranges import ChannelRanges, RangeStep
from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.inputs import chain, from_written, written
from posttrain.trajectory import PosttrainError


def test_values_are_rounded_by_the_papers_formula() -> None:
    step = RangeStep.of(torch.tensor([-1.0, 0.0]), torch.tensor([2.0, 3.0]), bits=2)
    # 2 bits: sigma = 3/3 = 1, zeta = round(l) + 2, so values are whole numbers from l to u
    given = torch.tensor([[-1.4, 0.6], [0.4, 3.9], [9.0, -5.0]])
    assert step(given).tolist() == [[-1.0, 1.0], [0.0, 3.0], [2.0, 0.0]]


def test_each_channel_has_sixteen_values_inside_its_range() -> None:
    draw = torch.Generator().manual_seed(0)
    given = torch.randn(500, 3, generator=draw) * torch.tensor([0.1, 1.0, 10.0]) + torch.tensor([0.0, 5.0, 0.0])
    moments = InputMoments(3)
    moments.add(given)
    step = ChannelRanges(4).fit(moments, 3, "w")
    found = step(given)
    width = (given.amax(0) - given.amin(0)) / 15
    for channel in range(3):
        assert len(found[:, channel].unique()) <= 16
    assert ((found - given).abs() <= width / 2 + width).all()  # the zero point is rounded too: up to half a step more
    assert float((found - given).abs().mean(0).div(width).max()) < 0.5


def test_a_channel_that_never_changes_keeps_its_value() -> None:
    step = RangeStep.of(torch.tensor([0.0, 0.7]), torch.tensor([0.0, 0.7]), 4)
    found = step(torch.tensor([[0.0, 0.7]]))
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.7]]), atol=1e-5, rtol=0)


def test_ranges_by_place_belong_to_rows_and_fix_their_number() -> None:
    step = RangeStep.of_positions(torch.tensor([0.0, 0.0]), torch.tensor([3.0, 30.0]), width=4, bits=2)
    given = torch.tensor([[1.2, 2.0, 9.0, 0.0], [12.0, 20.0, 90.0, 0.0]])
    torch.testing.assert_close(step(given[None])[0], torch.tensor([[1.0, 2.0, 3.0, 0.0], [10.0, 20.0, 30.0, 0.0]]))
    with pytest.raises(PosttrainError, match="expected the 2 places of an image"):
        step(torch.zeros(1, 3, 4))


def test_it_keeps_the_inputs_dtype_and_does_not_move() -> None:
    step = RangeStep.of(torch.zeros(2), torch.ones(2), 4)
    assert step(torch.full((1, 2), 100.0, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert step.high.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("positions", [0, 3])
def test_it_is_read_from_its_description(positions: int) -> None:
    step = RangeStep(4, 4, positions)
    step.low.uniform_(-2, -1)
    step.high.uniform_(1, 2)
    steps = chain([step])
    again = from_written(written(steps))
    assert again is not None
    assert steps is not None
    again.load_state_dict(steps.state_dict())
    given = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(given), steps(given))


def test_without_calibration_there_is_no_range() -> None:
    with pytest.raises(PosttrainError, match="w met no calibration token"):
        ChannelRanges().fit(InputMoments(3), 3, "w")
