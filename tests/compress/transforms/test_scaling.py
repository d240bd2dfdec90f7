"""SmoothQuant, AWQ and Outlier Suppression+: by hand, against the papers' equations written here, and in limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from block_models import blocks_of, first_block, logits, model_of, same, transform
from posttrain.compress.activations.crossquant import CrossQuant
from posttrain.compress.fold import change, parameters
from posttrain.compress.grids.restricted import Restricted
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.solvers.clipped import clipped
from posttrain.compress.structure import norm_outputs, structure
from posttrain.compress.transforms.awq import AWQ, importance
from posttrain.compress.transforms.cross_fold import CrossFold
from posttrain.compress.transforms.search import Part, best, leading, rounded
from posttrain.compress.transforms.shift import OutlierSuppression, centre, scaling, thresholds
from posttrain.compress.transforms.smooth import SmoothQuant, smoothing
from posttrain.compress.transforms.transform import Transform
from posttrain.trajectory import PosttrainError

TRANSFORMS: dict[str, Transform] = {
    "smooth": SmoothQuant(),
    "awq": AWQ(Uniform(3, 16), points=3),
    "os+": OutlierSuppression(Restricted(6, 0), 6, lower=0.5),
    "cross": CrossFold(),
}


@pytest.mark.parametrize("which", TRANSFORMS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "opt", "gpt-neox", "mixtral", "gemma2", "phi3", "mamba", "vit"])
def test_nothing_changes(name: str, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.compress.transforms.shift.STEPS", 3)
    model = model_of(name)
    before, weights = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    transform(model, [TRANSFORMS[which]])
    assert same(logits(model), before)
    now = model.state_dict()
    assert any(not torch.equal(now[k], v) for k, v in weights.items())


@pytest.mark.parametrize("which", ["smooth", "awq", "os+"])
def test_a_post_norm_model_is_refused(which: str) -> None:
    with pytest.raises(PosttrainError, match="post-norm block"):
        TRANSFORMS[which].apply_to_block(first_block("bert"))


# -- SmoothQuant


def test_smoothing_by_hand() -> None:
    # 8 and 2 in X, 2 and 0.5 in W: s = sqrt(8) / sqrt(2) = 2, sqrt(2) / sqrt(.5) = 2
    weights = [torch.tensor([[2.0, -0.5]]), torch.tensor([[1.0, 0.25]])]
    assert torch.allclose(smoothing(torch.tensor([8.0, 2.0]), weights, 0.5), torch.tensor([2.0, 2.0]))
    assert torch.allclose(smoothing(torch.tensor([8.0, 2.0]), weights, 1.0), torch.tensor([8.0, 2.0]))
    assert torch.allclose(smoothing(torch.tensor([8.0, 2.0]), weights, 0.0), torch.tensor([0.5, 2.0]))


def test_with_alpha_1_activations_are_even_and_with_half_as_uneven_as_weights() -> None:
    for alpha in (1.0, 0.5):
        block = first_block("llama")
        SmoothQuant(alpha).apply_to_block(block)
        largest = norm_outputs(block, ["input_layernorm"])["input_layernorm"].absmax
        if alpha == 1.0:
            assert torch.allclose(largest, torch.ones(32), atol=1e-4)
        else:
            read = [block.linears[f"self_attn.{p}_proj"].weight.abs().amax(0) for p in "qkv"]
            assert torch.allclose(largest, torch.stack(read).amax(0), atol=1e-4)


# -- AWQ


def test_importance_by_hand() -> None:
    # sqrt(4), sqrt(1): (2, 1) / sqrt(2)
    assert torch.allclose(importance(torch.tensor([4.0, 1.0]), 0.5), torch.tensor([2.0, 1.0]) / 2**0.5)
    assert torch.equal(importance(torch.tensor([4.0, 0.0]), 0.0), torch.ones(2))


def test_the_search_takes_the_best_of_the_papers_losses() -> None:
    """Losses of the first site of a block, computed here: attention as a function of weights, mean squared error."""
    grid = Uniform(2, 16)
    block, reference = first_block("llama"), first_block("llama")
    for each in (block, reference):  # some channels that matter more
        each.module.get_parameter("input_layernorm.weight")[::8] *= 8
    attention: Any = reference.module.get_submodule("self_attn")
    given: list[dict[str, Any]] = []
    attention.register_forward_pre_hook(lambda m, args, keywords: given.append(keywords), with_kwargs=True)
    reference.outputs()
    mean = torch.cat([g["hidden_states"].reshape(-1, 32) for g in given]).abs().mean(0)
    wanted = [attention(**g)[0] for g in list(given)]
    original = {p: getattr(attention, f"{p}_proj").weight.clone() for p in "qkv"}
    losses, scales = [], []
    for i in range(20):
        s = (mean ** (i / 20)).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        for p, weight in original.items():
            groups = [grid.fit(part).rounded(part) for part in (weight * s).split(16, 1)]
            getattr(attention, f"{p}_proj").weight.copy_(torch.cat(groups, 1) / s)
        given_now = given[: len(wanted)]
        losses.append(
            sum(float((attention(**g)[0] - w).square().sum()) for g, w in zip(given_now, wanted, strict=True))
        )
        scales.append(s)
    best = scales[losses.index(min(losses))]
    assert not torch.equal(best, torch.ones(32))
    gain = block.module.get_parameter("input_layernorm.weight").clone()
    AWQ(grid).apply_to_block(block)
    assert torch.allclose(block.module.get_parameter("input_layernorm.weight"), gain / best, rtol=1e-4)


def test_shared_values_are_not_scaled_and_others_are() -> None:
    for name, layer, one_to_one in (("llama", "self_attn.o_proj", False), ("opt", "self_attn.out_proj", True)):
        block = first_block(name)
        before = block.linears[layer].weight.clone()
        AWQ(Uniform(2, 16)).apply_to_block(block)
        assert torch.equal(block.linears[layer].weight, before) != one_to_one


def test_clipping_by_an_exhaustive_search() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(3, 8, generator=draw), torch.randn(40, 8, generator=draw)
    weight[0, 2] = 6.0
    grid = Uniform(2, 4)
    found = clipped(weight, x, grid, "")
    for row in range(3):
        for start in (0, 4):
            w, met = weight[row : row + 1, start : start + 4], x[:, start : start + 4]
            tried = [w.clamp(-m, m) for m in (w.abs().max() * (1 - i / 20) for i in range(10))]
            errors = [float(((grid.fit(t).rounded(t) - w) @ met.T).square().mean()) for t in tried]
            assert torch.equal(found[row : row + 1, start : start + 4], tried[errors.index(min(errors))])
    assert found[0, 2] < 6.0


def test_clipping_works_on_few_tokens_and_whole_rows_and_not_on_none() -> None:
    weight = torch.randn(3, 8)
    assert clipped(weight, torch.randn(1, 8), Uniform(3, 0), "").shape == (3, 8)
    with pytest.raises(PosttrainError, match="x met no calibration token"):
        clipped(weight, torch.zeros(0, 8), Uniform(3, 0), "x")


# -- Outlier Suppression+


def test_shift_and_scale_by_hand() -> None:
    low, high = torch.tensor([9.0, -1.0, -8.0]), torch.tensor([11.0, 1.0, 4.0])
    z = centre(low, high)
    assert z.tolist() == [10.0, 0.0, -2.0]
    assert (high - z).tolist() == [1.0, 1.0, 6.0]
    assert scaling(high - z, 2.0).tolist() == [1.0, 1.0, 3.0]
    assert scaling(high - z, 6.0).tolist() == [1.0, 1.0, 1.0]


def test_thresholds_go_from_the_largest_input_to_the_lower_bound() -> None:
    tried = thresholds(20.0, 12.0, 1.0)
    assert len(tried) == 101
    assert tried[0] == 20.0
    assert tried[-1] == pytest.approx(1.0)
    assert len(thresholds(200.0, 120.0, 1.0)) == 241
    assert thresholds(0.5, 0.5, 1.0) == [0.5]


def one_sided(name: str = "opt") -> Any:
    """A block with three channels of its first norm far from 0, and everything that reads them compensated."""
    block = first_block(name)
    away = torch.zeros(32)
    away[[3, 10, 20]] = -20.0
    for site in structure(block).norms:
        scale = torch.ones(32)
        scale[[3, 10, 20]] = 1 / 8
        change(block.module, site.scaled(parameters(block.module), scale, away))
    return block


def test_channels_are_centred() -> None:
    block = one_sided()
    before = block.outputs()[0]
    OutlierSuppression(shift=True, scale=False, tokens=1).apply_to_block(block)
    met = norm_outputs(block, ["self_attn_layer_norm"])["self_attn_layer_norm"]
    assert torch.allclose(met.minimum, -met.maximum, atol=1e-4)
    assert same(block.outputs()[0], before)


def test_with_a_large_threshold_nothing_is_scaled() -> None:
    block = first_block("opt")
    gain = block.module.get_parameter("final_layer_norm.weight").clone()
    OutlierSuppression(shift=False, lower=1e4).apply_to_block(block)
    assert torch.equal(block.module.get_parameter("final_layer_norm.weight"), gain)


def test_the_search_takes_the_best_of_the_papers_losses_for_a_layer_alone() -> None:
    """fc1 of OPT: sum over features of (Q(X'') Q(W'')^T - X' W^T)^2, written here; the bias cancels."""
    bits, grid = 4, Restricted(4, 0)
    block, reference = one_sided(), one_sided()
    suppression = OutlierSuppression(grid, bits, lower=1.0, tokens=1)
    found = structure(block)
    site = next(s for s in found.norms if s.norm == "final_layer_norm")
    suppression._norm(block, found, site, ["fc1"])
    outputs: list[torch.Tensor] = []
    norm = reference.module.get_submodule("final_layer_norm")
    norm.register_forward_hook(lambda m, given, out: outputs.append(out))
    reference.outputs()
    x, weight = outputs[0], reference.linears["fc1"].weight  # searched on the first call, in the ranges of all
    every = torch.cat([out.reshape(-1, out.shape[-1]) for out in outputs])
    z = (every.amax(0) + every.amin(0)) / 2
    moved, every = x - z, every - z
    u = float(every.abs().max())
    n = max(100, int(float(every.max()) / 0.5))
    losses, scales = [], []
    for i in range(n + 1):
        t = u - i * (u - 1.0) / n
        s = torch.maximum(every.amax(0) / t, -every.amin(0) / t).clamp(min=1)
        q = (moved / s / (t / 7)).round().clamp(-8, 7) * (t / 7)
        step = (weight * s).abs().amax(1, keepdim=True).div(7).half().float()
        losses.append(float((q @ (((weight * s) / step).round() * step).T - moved @ weight.T).square().sum()))
        scales.append(s)
    best = scales[losses.index(min(losses))]
    assert best.max() > 1
    was = reference.module.get_parameter("final_layer_norm.weight")
    assert torch.allclose(was / block.module.get_parameter("final_layer_norm.weight"), best, rtol=1e-4)
    bias = reference.module.get_parameter("final_layer_norm.bias")
    assert torch.allclose(block.module.get_parameter("final_layer_norm.bias"), (bias - z) / best, atol=1e-4)


def test_an_rms_norm_takes_no_shift() -> None:
    with pytest.raises(PosttrainError, match=r"cannot shift .*input_layernorm: it has no bias"):
        OutlierSuppression(shift=True).apply_to_block(first_block("llama"))


# -- shared


def test_crossquants_folded_path_is_the_plain_one() -> None:
    block, plain = first_block("llama"), first_block("llama")
    CrossFold(0.15).apply_to_block(block)
    block.refresh()
    name, part = "mlp.down_proj", CrossQuant(6, 0.15)
    layer = block.linears[name]
    folded = part.fit_layer(block.moments([name], gram=False)[name], layer, name)
    step = part.fit(plain.moments([name], gram=False)[name], 48, name)
    x = torch.randn(20, 48)
    found = F.linear(folded(layer.inputs(x)), layer.weight)  # type: ignore[operator, attr-defined]
    assert torch.allclose(found, F.linear(step(x), plain.linears[name].weight), atol=1e-4)


def test_parts_are_the_smallest_modules_around_layers() -> None:
    block = blocks_of(model_of("mixtral"))[0]
    holders = {
        "self_attn.q_proj": "self_attn.q_proj", "self_attn.q_proj self_attn.v_proj": "self_attn",
        "mlp.experts.0.up_proj mlp.experts.1.up_proj": "mlp.experts", "self_attn.q_proj mlp.experts.0.up_proj": "",
    }  # fmt: skip
    for names, holder in holders.items():
        assert Part(block, names.split(), block.inputs[:1]).name == holder


def test_a_part_that_is_not_changed_makes_no_error_and_as_many_calls_are_looked_at_as_hold_the_tokens() -> None:
    block = first_block("llama")
    assert Part(block, ["mlp.up_proj"], block.inputs).error({}) == 0.0
    assert [len(leading(block.inputs, tokens)) for tokens in (1, 36, 37, 1000)] == [1, 1, 2, 2]  # of 36 tokens each


@pytest.mark.parametrize(("layers", "module"), [(["down_proj"], "mlp.down_proj"), (["up_proj", "gate_proj"], "mlp")])
def test_an_error_is_that_of_the_outputs_and_infinite_where_it_is_above_what_is_of_interest(
    layers: list[str], module: str
) -> None:
    block = first_block("llama")
    part, around = Part(block, [f"mlp.{name}" for name in layers], block.inputs), block.module.get_submodule(module)
    assert part.name == module
    met: list[torch.Tensor] = []
    hook = around.register_forward_pre_hook(lambda m, args: met.append(args[0]))
    block.outputs()
    hook.remove()
    wanted = [around(x) for x in met]
    weight = block.linears[f"mlp.{layers[0]}"].weight
    kept, changed = weight.clone(), weight + 0.1 * torch.randn_like(weight)
    weight.copy_(changed)
    errors = [around(x) - y for x, y in zip(met, wanted, strict=True)]
    weight.copy_(kept)
    changes = {f"mlp.{layers[0]}.weight": changed}
    found = part.error(changes)
    assert found == pytest.approx(float(torch.cat([e.flatten() for e in errors]).square().mean()), rel=1e-4)
    assert part.error(changes, least=found) == found
    if module == "mlp":  # a layer alone is computed at once
        assert part.error(changes, least=found / 2) == torch.inf


@given(st.lists(st.sampled_from([0.0, 1.0, 2.5, 3.0, torch.inf]), min_size=1, max_size=9))
def test_the_best_is_the_first_of_the_least(losses: list[float]) -> None:
    """However much of the others is computed."""
    places = list(range(len(losses)))
    assert best(places, lambda i, least: losses[i] if losses[i] <= least else torch.inf) == losses.index(min(losses))
    assert best(places, lambda i, least: losses[i]) == losses.index(min(losses))


def test_an_expert_that_the_searched_tokens_do_not_reach_is_shown_them() -> None:
    model = model_of("mixtral")
    router = model.get_submodule("model.layers.0.mlp.gate")
    router.register_forward_hook(lambda m, args, out: (out[0], out[1], out[2].masked_fill(out[2] == 2, 0)))
    block, name = blocks_of(model)[0], "mlp.experts.2.down_proj"
    before = block.outputs()[0]
    part = Part(block, [name], block.inputs)
    assert sum(len(out) for out in part.outputs) == sum(c.hidden.shape[:-1].numel() for c in block.inputs)
    assert part.error({f"{name}.weight": block.linears[name].weight * 2}) > 0
    assert same(block.outputs()[0], before)


def test_all_groups_at_once_are_rounded_as_one_by_one() -> None:
    weight, grid = torch.randn(6, 32), Uniform(3, 8)
    apart = torch.cat([grid.fit(part).rounded(part) for part in weight.split(8, 1)], 1)
    assert torch.equal(rounded(weight, grid, ""), apart)
