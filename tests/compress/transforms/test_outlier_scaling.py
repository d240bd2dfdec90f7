"""CBQ's scaling: nothing changes, and only what sticks out is scaled."""

from __future__ import annotations

import pytest
import torch

from block_models import first_block, logits, model_of, same, transform
from posttrain.compress.structure import norm_outputs
from posttrain.compress.transforms.outliers import OutlierScaling
from posttrain.trajectory import PosttrainError


def planted(name: str) -> torch.nn.Module:
    """A model whose first norm makes one channel large."""
    model = model_of(name)
    for module, parameter in model.named_parameters():
        if "input_layernorm.weight" in module:
            parameter.data[3] *= 40
    return model


@pytest.mark.parametrize("name", ["llama", "opt", "gpt-neox"])
def test_nothing_changes(name: str) -> None:
    model = planted(name)
    before = logits(model)
    transform(model, [OutlierScaling()])
    assert same(logits(model), before)


def test_the_planted_channel_is_scaled_by_the_root_and_no_other_of_its_norm() -> None:
    block = first_block("llama")
    gain = block.module.input_layernorm.weight
    gain.data[3] *= 40
    before, largest = gain.clone(), norm_outputs(block, ["input_layernorm"])["input_layernorm"].absmax
    OutlierScaling().apply_to_block(block)
    first, third = largest.quantile(0.25), largest.quantile(0.75)
    limit = third + 1.5 * (third - first)  # T: no other channel lies above
    assert int((largest > limit).sum()) == 1
    scale = before / block.module.input_layernorm.weight
    assert scale[3].item() == pytest.approx(float((largest[3] / limit).sqrt()), rel=1e-4)
    assert torch.allclose(scale[torch.arange(len(scale)) != 3], torch.ones(len(scale) - 1))


def test_by_hand() -> None:
    absmax = torch.tensor([1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 16.0])
    assert torch.allclose(OutlierScaling().scaling(absmax)[-1], (absmax[-1] / 1.225).sqrt(), rtol=0.05)
    assert torch.equal(OutlierScaling().scaling(absmax[:-1]), torch.ones(6))
    assert torch.equal(OutlierScaling().scaling(torch.zeros(4)), torch.ones(4))
    with pytest.raises(PosttrainError, match="from 0 on"):
        OutlierScaling(coarse=-1.0)
