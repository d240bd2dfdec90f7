"""Planted outliers: channels become large, and the model stays what it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from conftest import make_model
from posttrain.compress.stacks import stacks
from posttrain.compress.structure import norm_outputs, structure
from posttrain.compress.walk import Walk
from posttrain.lab.text import plain
from posttrain.models.causal import CausalPolicy
from posttrain.studies.planted import large_channels, one_sided_channels, principal_channels

Plant = Callable[[CausalPolicy, int], CausalPolicy]
TOKENS = torch.arange(3, 43).view(2, 20)


def ranges(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Smallest and largest output of each norm that layers read."""
    block = next(iter(Walk(model, stacks(model)[0], [{"input_ids": TOKENS, "use_cache": False}])))
    found = norm_outputs(block, [site.norm for site in structure(block).norms])
    return [(m.minimum, m.maximum) for m in found.values()]


@pytest.mark.parametrize("plant", [large_channels, one_sided_channels, principal_channels])
def test_the_model_stays_what_it_was(plant: Plant, tiny_tokenizer: Any) -> None:
    model = make_model().requires_grad_(False)
    before = model(TOKENS).logits
    after = plant(CausalPolicy(model, tiny_tokenizer), 0).model(TOKENS).logits
    assert torch.allclose(after, before, atol=1e-4 * float(before.abs().max()))


def test_large_channels(tiny_tokenizer: Any) -> None:
    model = make_model().requires_grad_(False)
    large_channels(CausalPolicy(model, tiny_tokenizer), 0)
    for low, high in ranges(model):
        size = torch.maximum(-low, high)
        assert int((size > 8 * size.median()).sum()) == 4


def test_one_sided_channels_lie_far_from_0_and_others_around_it(tiny_tokenizer: Any) -> None:
    model = make_model().requires_grad_(False)
    one_sided_channels(CausalPolicy(model, tiny_tokenizer), 0)
    for low, high in ranges(model):
        middle = (low + high) / 2
        assert int((middle > 10).sum()) == 3
        assert middle.sort().values[:-3].abs().max() < 3


def test_which_channels_follows_the_seed(tiny_tokenizer: Any) -> None:
    gains = []
    for seed in (0, 0, 1):
        model: Any = large_channels(CausalPolicy(make_model().requires_grad_(False), tiny_tokenizer), seed).model
        gains.append(model.model.layers[0].input_layernorm.weight.clone())
    assert torch.equal(gains[0], gains[1])
    assert not torch.equal(gains[0], gains[2])


def test_principal_channels_are_unequal_and_uncorrelated(tiny_tokenizer: Any) -> None:
    model: Any = make_model().requires_grad_(False)
    principal_channels(CausalPolicy(model, tiny_tokenizer), 0)
    assert torch.equal(model.model.layers[0].input_layernorm.weight, torch.ones(32))
    text = "\n".join(plain(640, 0))
    tokens = torch.tensor(tiny_tokenizer.encode(text, add_special_tokens=False))
    hidden = [b.inputs[0].hidden for b in Walk(model, stacks(model)[0], [{"input_ids": tokens[:3968].view(-1, 128)}])]
    x = torch.cat([h.flatten(0, -2) / h.norm(dim=-1).flatten()[:, None] for h in hidden])
    moment = x.T @ x / len(x)
    sizes = moment.diag().sqrt()
    assert sizes[0] > 2 * sizes.median()
    assert (moment - moment.diag().diag()).abs().max() < 0.2 * moment.max()
