"""A probability shaped by the advantage, and the slope that autograd takes of the shape."""

from __future__ import annotations

import math

import pytest
import torch
from flat_batches import ragged
from torch import Tensor

from posttrain.objective.advantage_shaped import AdvantageShaped, LearnRareAvoidLikely
from posttrain.objective.denominator import Ratio
from posttrain.objective.off_policy import Shaped


def ratio(probabilities: list[float], advantage: list[float], **arguments: object) -> Ratio:
    batch = ragged([[len(probabilities)]])
    batch.advantage = torch.tensor(advantage, dtype=torch.float64)
    logp = torch.tensor(probabilities, dtype=torch.float64).log()
    return AdvantageShaped(**arguments)(batch, logp)  # type: ignore[arg-type]


@pytest.mark.limit("thinktuning")
def test_by_hand() -> None:
    # card 085 (b): at p = 0.1 the slope of p / (p + 0.1) in log p is 0.25, its maximum
    found = ratio([0.1, 0.05, 0.3, 0.9, 0.1, 0.5], [1, 2, 1, 0.5, -1, 0])
    assert found.weight[0].item() == pytest.approx(0.25, abs=1e-12)
    assert float(found.weight[:4].max()) == found.weight[0].item()
    assert found.value.tolist() == pytest.approx([0.5, 1 / 3, 0.75, 0.9, 0.1, 0.5])
    assert found.weight[4:].tolist() == pytest.approx([0.1, 0.5])  # p itself, for A <= 0
    assert found.log_ratio.tolist() == [0] * 6  # nothing for a clip to look at


def test_for_what_is_learned_it_is_the_shape_of_luffy() -> None:
    batch = ragged([[5]])
    batch.advantage = torch.full((5,), 0.3)
    logp = torch.tensor([-0.1, -1.0, -3.0, -8.0, -20.0])
    ours, theirs = AdvantageShaped(LearnRareAvoidLikely(0.2))(batch, logp), Shaped(0.2)(batch, logp)
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.value, theirs.value)


def test_any_differentiable_shape_will_do() -> None:
    def square(probability: Tensor, advantage: Tensor) -> Tensor:
        return probability**2 * (advantage < 0)

    found = ratio([0.5, 0.5], [1, -1], shape=square)
    assert found.value.tolist() == [0, 0.25]
    assert found.weight.tolist() == pytest.approx([0, 2 * 0.25])  # d p^2 / d log p


def test_is_constant_and_works_without_gradients() -> None:
    batch = ragged([[2]])
    batch.advantage = torch.ones(2)
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    with torch.no_grad():
        measured = AdvantageShaped()(batch, logp)
    trained = AdvantageShaped()(batch, logp)
    assert torch.equal(measured.weight, trained.weight)
    assert not any(t.requires_grad for t in (trained.weight, trained.value, trained.log_ratio))
    assert measured.weight[0].item() == pytest.approx(0.1 * math.exp(-1) / (math.exp(-1) + 0.1) ** 2)


def test_needs_a_fixed_advantage() -> None:
    with pytest.raises(RuntimeError, match="before the update"):
        AdvantageShaped()(ragged([[1]]), torch.zeros(1))
