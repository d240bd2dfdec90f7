"""Q-VLM: entropies of known profiles, the joint search against all combinations, its limits, and a model that sees."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from posttrain.compress.activations.ranges import ChannelRanges, RangeStep
from posttrain.compress.calls import Batch
from posttrain.compress.grids.table import Table
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.method import Compression
from posttrain.compress.packed.linear import PackedLinear
from posttrain.compress.pipeline import compress_model
from posttrain.compress.solvers.dependency import Partition, dependency, entropy
from posttrain.compress.solvers.q_vlm import JointClipping, Search, closest, outputs_of
from posttrain.compress.solvers.rtn import RoundToNearest, rounded
from posttrain.compress.stacks import stacks
from posttrain.compress.walk import Block, Walk
from posttrain.trajectory import PosttrainError
from tiny_models import make_policy, random_tokens

GRID = Table(4, 16)
RATIOS = (1.0, 0.8, 0.6)


def tiny(name: str = "llama", **overrides: Any) -> nn.Module:
    return make_policy(name, None, **{"num_hidden_layers": 1, **overrides}).base


def text() -> list[Batch]:
    ids = random_tokens(6 * 12, torch.Generator().manual_seed(0)).view(6, 12)
    return [{"input_ids": ids[:4], "use_cache": False}, {"input_ids": ids[4:], "use_cache": False}]


def opened(model: nn.Module, batches: list[Batch] | None = None, bits: int = 4) -> Block:
    """The first block with ranges by channel."""
    block = next(iter(Walk(model, stacks(model)[0], batches or text())))
    moments = block.moments(list(block.linears), gram=False)
    for name, layer in block.linears.items():
        block.quantizers[name] = ChannelRanges(bits).fit(moments[name], layer.in_features, name)
    return block


def ranges(model: nn.Module) -> dict[str, RangeStep]:
    found = {n: m.inputs[0] for n, m in model.named_modules() if isinstance(m, PackedLinear) and m.inputs is not None}
    assert all(isinstance(step, RangeStep) for step in found.values())
    return found  # type: ignore[return-value]


# -- entropies -------------------------------------------------------------------------------------------------------


def test_entropy_of_one_token_is_nothing_and_of_equal_ones_the_logarithm_of_their_number() -> None:
    one = torch.zeros(8, 3)
    one[5] = torch.tensor([1.0, -2.0, 7.0])
    assert entropy(one) == 0.0
    assert entropy(torch.full((8, 3), -0.5)) == pytest.approx(math.log(8))
    half = torch.cat([one[:, :1], torch.ones(8, 1)], 1)  # over tokens, averaged over channels
    assert entropy(half) == pytest.approx(math.log(8) / 2)
    assert entropy(torch.zeros(8, 2)) == 0.0  # a dead channel is no NaN


def test_dependency_by_hand() -> None:
    x, y = torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [1.0]])
    # p(x) = (1/4, 3/4), p(y) = (1/2, 1/2); joint (1/4, 3/4); y/x = (2, 2/3) -> (3/4, 1/4)
    wanted = -(0.25 * math.log(0.75) + 0.75 * math.log(0.25))
    assert dependency(x, y) == pytest.approx(wanted, abs=1e-4)
    assert dependency(torch.zeros(4, 2), torch.zeros(4, 2)) == 0.0


def test_layers_join_where_entropy_is_above_the_mean_and_there_is_room() -> None:
    flat, steep = torch.ones(8, 2), torch.zeros(8, 2)
    steep[0] = 1.0
    assert Partition(3).joined([flat] * 5) == [[0, 1, 2], [3, 4]]
    assert Partition(1).joined([flat] * 3) == [[0], [1], [2]]
    partition = Partition(3)
    partition.dependencies = [100.0]  # what came before was far higher
    assert partition.joined([flat] * 3) == [[0], [1], [2]]
    wide = torch.ones(8, 3)  # where shapes change, a layer's own entropy counts
    partition = Partition(3)
    assert partition.joined([flat, wide]) == [[0, 1]]
    assert partition.entropies == [pytest.approx(math.log(8))]
    assert partition.dependencies == []


# -- the search ------------------------------------------------------------------------------------------------------


def installed(block: Block, stages: list[list[str]]) -> Search:
    search = Search(block, stages, block.inputs)
    for name in (n for stage in stages for n in stage):
        block.install(name, rounded(block.linears[name].weight.detach().float(), GRID, name))
    return search


def test_all_combinations_of_two_layers_are_tried() -> None:
    block = opened(tiny())
    search = installed(block, block.stages[2:4])
    chosen = search.choose(RATIOS, combinations=9, sweeps=1)
    errors = {c: search.error(c) for c in itertools.product(RATIOS, repeat=2)}
    assert chosen == min(errors, key=lambda c: errors[c])
    assert len(set(errors.values())) == 9


def test_moving_one_ratio_at_a_time_never_ends_above_the_whole_ranges() -> None:
    block = opened(tiny())
    search = installed(block, block.stages[:3])
    chosen = search.choose(RATIOS, combinations=9, sweeps=3)
    assert search.error(chosen) <= search.error((1.0, 1.0, 1.0))
    for place in range(3):  # no single ratio is better
        for ratio in RATIOS:
            moved = (*chosen[:place], ratio, *chosen[place + 1 :])
            assert search.error(chosen) <= search.error(moved)


def test_what_is_wanted_is_the_float_layers_on_the_compressed_prefix() -> None:
    block = opened(tiny())
    first = installed(block, block.stages[:1])
    first.set((0.5,))
    search = Search(block, block.stages[1:2], block.inputs)
    (name,) = block.stages[1]
    seen: list[Tensor] = []
    hook = block.module.get_submodule(name).register_forward_pre_hook(lambda m, given: seen.append(given[0]))
    block.outputs()
    hook.remove()
    for given, wanted in zip(seen, search.wanted, strict=True):
        torch.testing.assert_close(block.linears[name](given), wanted)


@pytest.mark.limit("q-vlm")
def test_with_blocks_of_one_layer_each_is_searched_alone() -> None:
    model = tiny()
    made = Compression("m", JointClipping(GRID, RATIOS, longest=1), activations=ChannelRanges(4))
    compress_model(model, made, text())
    again = tiny()
    block = opened(again)
    whole = {n: (s.low.clone(), s.high.clone()) for n, s in block.quantizers.items() if isinstance(s, RangeStep)}
    for stage in block.stages:  # layer after layer, written out
        wanted = outputs_of(block.module, stage, block.inputs)
        for name in stage:
            block.install(name, rounded(block.linears[name].weight.detach().float(), GRID, name))
        errors = {}
        for ratio in RATIOS:
            for name in stage:
                block.quantizers[name].moved(ratio * whole[name][0], ratio * whole[name][1])  # type: ignore[operator]
            found = outputs_of(block.module, stage, block.inputs)
            errors[ratio] = sum(float((a - b).square().sum()) for a, b in zip(found, wanted, strict=True))
        best = min(errors, key=lambda r: errors[r])
        for name in stage:
            block.quantizers[name].moved(best * whole[name][0], best * whole[name][1])  # type: ignore[operator]
    wanted_steps = ranges(again)
    for name, step in ranges(model).items():
        assert torch.equal(step.high, wanted_steps[name].high), name


@pytest.mark.limit("q-vlm")
@pytest.mark.parametrize("mode", ["joint", "released"])
def test_with_whole_ranges_alone_it_is_calibration_by_the_least_and_largest(mode: Any) -> None:
    found = []
    for solver in (JointClipping(GRID, (1.0,), mode=mode), RoundToNearest(GRID)):
        model = tiny(num_hidden_layers=2)
        compress_model(model, Compression("m", solver, activations=ChannelRanges(4)), text())
        found.append(model)
    # the plain method fits a block's ranges on float layers, as the search does
    for name, step in ranges(found[0]).items():
        assert torch.equal(step.high, ranges(found[1])[name].high)
    torch.testing.assert_close(found[0](**text()[0]).logits, found[1](**text()[0]).logits)


def test_the_search_brings_the_outputs_closer() -> None:
    model = tiny(num_hidden_layers=2)
    before = model(**text()[0]).logits.detach()
    errors = {}
    for name, ratios in (("whole", (1.0,)), ("searched", JointClipping().ratios)):
        model = tiny(num_hidden_layers=2)
        made = Compression("m", JointClipping(Uniform(8, 0), ratios), activations=ChannelRanges(3))
        compress_model(model, made, text())
        errors[name] = float((model(**text()[0]).logits.detach() - before).square().mean())
    assert errors["searched"] < errors["whole"]


def test_as_released_the_ratio_is_that_of_the_least_lost_inputs() -> None:
    draw = torch.Generator().manual_seed(0)
    given = torch.randn(200, 4, generator=draw)
    given[0] = 30.0  # one token stretches the ranges
    step = RangeStep.of(given.amin(0), given.amax(0), 4)
    high = step.high.clone()
    assert closest(step, given, (1.0, 0.5)) == 0.5
    assert torch.equal(step.high, high)


def test_experts_whose_tokens_change_are_compared_by_the_block() -> None:
    model = tiny("mixtral")
    made = Compression("m", JointClipping(GRID, RATIOS, combinations=3, sweeps=1), activations=ChannelRanges(4))
    before = model(**text()[0]).logits.detach()
    compress_model(model, made, text())
    assert float((model(**text()[0]).logits.detach() - before).norm() / before.norm()) < 0.7


def test_ranges_of_another_kind_are_refused() -> None:
    with pytest.raises(PosttrainError, match="expected activations=ChannelRanges"):
        compress_model(tiny(), Compression("m", JointClipping(GRID)), text())
    with pytest.raises(PosttrainError, match="expected joint or released"):
        JointClipping(mode="other")  # type: ignore[arg-type]
    with pytest.raises(PosttrainError, match="longest is 0"):
        JointClipping(longest=0)


# -- a model that sees -----------------------------------------------------------------------------------------------


def seeing() -> tuple[nn.Module, list[Batch]]:
    """A LLaVA-style model: a CLIP tower of 17 places, a projector, a Llama; and images with questions."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from tiny_models import SHAPE

    torch.manual_seed(0)
    side = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16,
        "patch_size": 4, "projection_dim": 32,
    }  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**side), text_config=LlamaConfig(**SHAPE), image_token_index=63,
        image_seq_length=16,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():  # CLIP starts so small that nothing would be seen of it
        for parameter in model.model.vision_tower.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    draw = torch.Generator().manual_seed(1)
    batches = []
    for rows in (3, 2):
        ids = torch.cat([torch.full((rows, 16), 63), torch.randint(0, 60, (rows, 8), generator=draw)], 1)
        images = torch.randn(rows, 3, 16, 16, generator=draw)
        batches.append({"input_ids": ids, "pixel_values": images, "use_cache": False})
    return model, batches


def test_a_model_that_sees_is_compressed_tower_and_all() -> None:
    model, batches = seeing()
    before = model(**batches[0]).logits.detach()
    made = Compression("q-vlm", JointClipping(Uniform(8, 0), RATIOS), activations=ChannelRanges(8))
    summary = compress_model(model, made, batches)
    tower = [layer.name for layer in summary.layers if "vision_tower" in layer.name]
    assert len(tower) == 3 * 6
    assert len(summary.layers) == 3 * 6 + 2 * 7
    places = {step.positions for name, step in ranges(model).items() if "vision_tower" in name}
    assert places == {17}  # 16 patches and one for the whole image
    assert {step.positions for name, step in ranges(model).items() if "language_model" in name} == {0}
    after = model(**batches[0]).logits.detach()
    assert 0 < float((after - before).norm() / before.norm()) < 0.1


def test_towers_ratios_are_their_own() -> None:
    model, batches = seeing()
    made = JointClipping(GRID, (1.0,), vision_ratios=(0.5,))
    compress_model(model, Compression("m", made, activations=ChannelRanges(6)), batches)
    halved = ranges(model)
    model, _ = seeing()
    compress_model(model, Compression("m", replace(made, vision_ratios=(1.0,)), activations=ChannelRanges(6)), batches)
    whole = ranges(model)
    name = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    name = next(n for n in whole if n.endswith("layers.0.self_attn.q_proj") and "vision" in n)
    torch.testing.assert_close(halved[name].high, 0.5 * whole[name].high)


def test_a_tower_whose_images_have_different_sizes_is_told_what_to_do() -> None:
    model = tiny()
    ragged = [{"input_ids": ids} for ids in (torch.zeros(2, 5).long(), torch.zeros(2, 7).long())]
    made = JointClipping(GRID, vision=("*",))
    with pytest.raises(PosttrainError, match=r"one number of places; set vision=\(\)"):
        compress_model(model, Compression("m", made, activations=ChannelRanges(4)), ragged)
