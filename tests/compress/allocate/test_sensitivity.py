"""The three scores of CPTQuant: their known values, the model left as it was, and that they see what is fragile."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from posttrain.compress.allocate.cptquant import BySensitivity, backwards, relative_error, to_nearest
from posttrain.compress.allocate.sensitivity import (
    Correlation,
    Layer,
    Pruning,
    Taylor,
    canonical_correlations,
    damage,
    directional_slope,
    first_tokens,
    input_gradients,
    layers,
    mean_loss,
    pruned,
)
from posttrain.compress.calls import Batch
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.method import Compression
from posttrain.compress.pipeline import compress_model
from posttrain.compress.solvers.rtn import RoundToNearest
from posttrain.compress.stacks import stacks
from posttrain.trajectory import PosttrainError
from tiny_models import make_policy, random_tokens


def tiny(name: str = "llama", **overrides: Any) -> nn.Module:
    return make_policy(name, None, **{"num_hidden_layers": 3, **overrides}).base


def text(rows: int = 8, length: int = 20, seed: int = 0) -> list[Batch]:
    ids = random_tokens(rows * length, torch.Generator().manual_seed(seed)).view(rows, length)
    return [{"input_ids": ids[: rows // 2], "use_cache": False}, {"input_ids": ids[rows // 2 :], "use_cache": False}]


def units(model: nn.Module, unit: Any = "block") -> list[Layer]:
    return layers(stacks(model), (), unit)


# -- canonical correlations ------------------------------------------------------------------------------------------


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_linear_function_is_wholly_correlated() -> None:
    x = normal(200, 6) + 5.0  # off the origin: they are centred
    torch.testing.assert_close(canonical_correlations(x, x @ normal(6, 6, seed=1) - 3.0), torch.ones(6).double())
    torch.testing.assert_close(canonical_correlations(x, x[:, :2]), torch.ones(2).double())


def test_independent_noise_is_hardly_correlated() -> None:
    found = canonical_correlations(normal(40_000, 4), normal(40_000, 4, seed=1))
    assert float(found.max()) < 3 * math.sqrt(4 / 40_000)
    # far off the origin too, where data that are not centred would correlate wholly
    found = canonical_correlations(normal(40_000, 4) + 100, normal(40_000, 4, seed=1) + 100)
    assert float(found.max()) < 3 * math.sqrt(4 / 40_000)


def test_correlations_of_one_dimension_are_pearsons() -> None:
    x = normal(500, 1)
    y = 0.3 * x + normal(500, 1, seed=1)
    wanted = abs(float(torch.corrcoef(torch.cat([x, y], 1).T)[0, 1]))
    assert float(canonical_correlations(x, y)) == pytest.approx(wanted, abs=1e-7)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(PosttrainError, match="8 dimensions need 32 tokens and calibration has 31"):
        canonical_correlations(normal(31, 8), normal(31, 8))


@pytest.mark.parametrize("target", ["input", "next", "final"])
def test_a_block_that_adds_a_linear_function_is_not_sensitive(target: Any) -> None:
    model = tiny()
    block = model.get_submodule("model.layers.1")
    block.register_forward_hook(lambda m, given, out: given[0] * 1.5)  # it adds half of what it is given
    found = Correlation(target=target).sensitivity(model, units(model), text(20))
    assert set(found) == {"model.layers.0", "model.layers.1", "model.layers.2"}
    assert all(0 <= v <= 1 for v in found.values())
    if target == "input":
        assert found["model.layers.1"] < 1e-4
        assert found["model.layers.0"] > 0.1


def test_wide_states_are_projected_alike() -> None:
    model = tiny()
    found = Correlation(width=8).sensitivity(model, units(model), text())
    again = Correlation(width=8).sensitivity(model, units(model), text())
    assert found == again
    with pytest.raises(PosttrainError, match="need 128 tokens"):
        Correlation(tokens=60).sensitivity(model, units(model), text())


# -- pruning ---------------------------------------------------------------------------------------------------------


def test_pruning_sets_the_smallest_weights_to_zero() -> None:
    weight = torch.tensor([[3.0, -1.0], [0.5, -4.0]])
    assert torch.equal(pruned(weight, 0.5), torch.tensor([[3.0, 0.0], [0.0, -4.0]]))
    assert torch.equal(pruned(weight, 0.0), weight)


@pytest.mark.parametrize("by", ["block", "linear"])
def test_pruning_leaves_the_weights_bit_for_bit(by: Any) -> None:
    model = tiny()
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = Pruning(by=by).sensitivity(model, units(model, by), text())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert len(found) == (3 if by == "block" else 21)
    assert max(found.values()) > 0


def test_pruning_nothing_costs_nothing() -> None:
    model = tiny()
    assert set(Pruning(shares=(0.0,)).sensitivity(model, units(model), text()).values()) == {0.0}


def test_what_pruning_costs_is_the_share_of_perplexity() -> None:
    model = tiny()
    unit = units(model)[1]
    before = math.exp(mean_loss(model, text()))
    with torch.no_grad():
        for module in unit.modules.values():
            module.weight.copy_(pruned(module.weight, 0.3))
    after = math.exp(mean_loss(model, text()))
    fresh = tiny()
    found = Pruning(shares=(0.3,)).sensitivity(fresh, units(fresh), text())
    assert found[unit.name] == pytest.approx(max(0.0, (after - before) / before), rel=1e-5)


# -- the slope of the loss -------------------------------------------------------------------------------------------


def test_the_gradient_is_the_limit_of_the_difference_along_it() -> None:
    model = tiny().double()
    batch = text()[0]
    found = Taylor(form="gradient").sensitivity(model, units(model), [batch])
    blocks = [unit.block for unit in units(model)]
    gradients = input_gradients(model, blocks, batch)
    for unit, gradient in zip(units(model), gradients, strict=True):
        slope = directional_slope(model, unit.block, batch, 1e-4, gradient)
        assert slope == pytest.approx(found[unit.name], rel=1e-3)
        assert slope == pytest.approx(float(gradient.norm()), rel=1e-3)


def test_gradients_are_autograds_on_the_embeddings() -> None:
    model = tiny()
    ids = text()[0]["input_ids"]
    given = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    model(inputs_embeds=given, labels=ids, use_cache=False).loss.backward()
    (found, *_) = input_gradients(model, [unit.block for unit in units(model)], text()[0])
    torch.testing.assert_close(found, given.grad, atol=1e-6, rtol=1e-4)


def test_layers_that_share_an_input_have_slopes_of_their_own() -> None:
    model = tiny().double()
    linear = units(model, "linear")
    found = Taylor(form="gradient", by="linear").sensitivity(model, linear, text()[:1])
    assert len({round(found[f"model.layers.1.self_attn.{n}_proj"], 9) for n in "qkv"}) == 3
    (unit,) = (u for u in linear if u.name.endswith("1.mlp.up_proj"))
    (gradient,) = input_gradients(model, [unit.perturbed], text()[0])
    slope = directional_slope(model, unit.perturbed, text()[0], 1e-4, gradient)
    assert slope == pytest.approx(found[unit.name], rel=1e-3)


def test_random_directions_find_less_than_the_steepest_one_and_stay_fixed() -> None:
    model = tiny()
    steep = Taylor(form="gradient").sensitivity(model, units(model), text())
    first, again = (Taylor(directions=3).sensitivity(model, units(model), text()) for _ in range(2))
    assert first == again
    assert all(0 < first[name] < steep[name] for name in steep)


def test_gradients_do_not_stay_in_the_model() -> None:
    model = tiny()
    Taylor(form="gradient").sensitivity(model, units(model), text())
    assert all(p.grad is None for p in model.parameters())


# -- allocation ------------------------------------------------------------------------------------------------------


def fragile(share: float = 30.0) -> nn.Module:
    """A model whose middle block rounds badly, and computes what it did: channels between two of its layers are scaled
    up on one side and down on the other, so that rows hold weights of very different sizes.
    """
    model = tiny(num_hidden_layers=6)
    block = model.get_submodule("model.layers.3")
    size = torch.logspace(-1, 1, block.mlp.up_proj.out_features).mul(share / 10)
    shuffled = size[torch.randperm(len(size), generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        block.mlp.up_proj.weight.mul_(shuffled[:, None])
        block.mlp.down_proj.weight.div_(shuffled)
        heads = torch.logspace(-1, 1, 16)
        block.self_attn.v_proj.weight.mul_(heads[:, None])
        block.self_attn.o_proj.weight.view(32, 2, 2, 8).div_(heads.view(2, 1, 8))
    return model


def test_the_fragile_model_computes_what_the_plain_one_does() -> None:
    model = tiny(num_hidden_layers=6)
    ids = text()[0]
    torch.testing.assert_close(fragile()(**ids).logits, model(**ids).logits, atol=1e-3, rtol=1e-3)


def test_damage_is_the_rise_of_the_loss_and_greatest_in_the_fragile_block() -> None:
    model = fragile()
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = damage(model, units(model), text(), lambda w: to_nearest(w, Uniform(4, 0), 4))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    sizes = {name: abs(value) for name, value in found.items()}
    assert max(sizes, key=lambda n: sizes[n]) == "model.layers.3"


def test_relative_errors_fall_with_the_bits_and_are_those_of_the_weights() -> None:
    model = fragile()
    unit = units(model)[3]
    errors = [relative_error(unit, Uniform(4, 0), bits) for bits in (2, 3, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    lost = sum(
        float((to_nearest(m.weight, Uniform(4, 0), 4) - m.weight).detach().square().sum())
        for m in unit.modules.values()
    )
    whole = sum(float(m.weight.detach().square().sum()) for m in unit.modules.values())
    assert errors[2] == pytest.approx(lost / whole, rel=1e-4)


@pytest.mark.parametrize("unit", ["block", "linear"])
def test_every_layer_gets_its_units_bits_at_the_mean(unit: Any) -> None:
    model = fragile()
    allocation = BySensitivity(Pruning(by=unit, shares=(0.3,)), 4.0, grid=Uniform(4, 0))
    bits = allocation.bits(model, stacks(model), text(), ())
    sizes = {n: m.weight.numel() for n, m in model.named_modules() if n in bits}
    assert len(bits) == 42
    mean = sum(bits[n] * sizes[n] for n in bits) / sum(sizes.values())
    assert 3.3 < mean <= 4.0
    if unit == "block":
        assert len({bits[n] for n in bits if n.startswith("model.layers.2.")}) == 1


def test_skipped_layers_get_no_bits() -> None:
    model = tiny()
    bits = BySensitivity(Taylor(form="gradient")).bits(model, stacks(model), text(), ("*.down_proj",))
    assert bits
    assert not any("down_proj" in name for name in bits)


def test_turned_around_the_most_sensitive_layer_stands_where_the_least_was() -> None:
    assert backwards([0.1, 0.9, 0.5]) == [0.9, 0.1, 0.5]
    assert backwards([3.0, 1.0, 2.0, 4.0]) == [2.0, 4.0, 3.0, 1.0]


@pytest.mark.limit("cptquant-cca", "cptquant-pruning", "cptquant-taylor")
@pytest.mark.parametrize("score", [Correlation(), Pruning(shares=(0.3,)), Taylor(form="gradient")])
def test_with_one_choice_of_bits_it_is_round_to_nearest(score: Any) -> None:
    found = []
    for allocation in (BySensitivity(score, 4.0, choices=(4,), grid=Uniform(3, 16)), None):
        model = tiny()
        solver = RoundToNearest(Uniform(3 if allocation else 4, 16))
        compress_model(model, Compression("m", solver, allocation=allocation), text())
        found.append(model(**text()[0]).logits)
    assert torch.equal(*found)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A model that continues arithmetic sequences of tokens: one whose layers are there for something."""
    model = tiny(num_hidden_layers=2, initializer_range=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(70):
        ids = sequences(24, step)[0]["input_ids"]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def sequences(rows: int, seed: int) -> list[Batch]:
    draw = torch.Generator().manual_seed(seed)
    start, step = torch.randint(0, 64, (rows, 1), generator=draw), torch.randint(1, 6, (rows, 1), generator=draw)
    return [{"input_ids": (start + step * torch.arange(20)) % 64, "use_cache": False}]


def test_sensitive_layers_lose_less_than_with_their_bits_turned_around(trained: nn.Module) -> None:
    losses = {}
    for name, turned in (("right", False), ("wrong", True)):
        model = copy.deepcopy(trained)
        score = Pruning(by="linear", shares=(0.3, 0.5))
        allocation = BySensitivity(score, 3.0, grid=Uniform(4, 0), backwards=turned)
        made = Compression("m", RoundToNearest(Uniform(4, 0)), allocation=allocation)
        compress_model(model, made, sequences(32, 1000))
        losses[name] = mean_loss(model, sequences(64, 1001))
    assert losses["right"] < losses["wrong"]


def test_a_score_foretells_the_damage(trained: nn.Module) -> None:
    linear = units(trained, "linear")
    assert mean_loss(trained, sequences(64, 1001)) < 2.0
    truth = damage(trained, linear, sequences(64, 1001), lambda w: to_nearest(w, Uniform(2, 0), 2))
    found = Pruning(by="linear", shares=(0.3, 0.5)).sensitivity(trained, linear, sequences(64, 1000))
    assert spearmanr([found[u.name] for u in linear], [truth[u.name] for u in linear]).statistic > 0.6


# -- text ------------------------------------------------------------------------------------------------------------


def test_the_first_tokens_are_whole_rows() -> None:
    found = first_tokens([{"input_ids": torch.zeros(4, 10), "attention_mask": torch.ones(4, 10)}] * 3, 55)
    assert [len(b["input_ids"]) for b in found] == [4, 1]
    assert [len(b["attention_mask"]) for b in found] == [4, 1]
    assert len(first_tokens([{"input_ids": torch.zeros(4, 10)}], 3)[0]["input_ids"]) == 1
    with pytest.raises(PosttrainError, match="expected batches with input_ids"):
        first_tokens([{"pixel_values": torch.zeros(4, 10)}], 3)


def test_the_loss_is_the_models_own() -> None:
    model = tiny()
    (batch, other) = text()
    wanted = float(model(**batch, labels=batch["input_ids"]).loss.detach())
    assert mean_loss(model, [batch]) == pytest.approx(wanted, rel=1e-5)
    assert mean_loss(model, [batch, other]) == pytest.approx((wanted + mean_loss(model, [other])) / 2, rel=1e-5)
