"""What feeds what in a block is found by trying, in many architectures; and folding a scale changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from block_models import first_block, logits, model_of, same
from posttrain.compress.fold import Pair, change, parameters
from posttrain.compress.stacks import stacks
from posttrain.compress.structure import Structure, foldable, gain_offset, norm_outputs, structure
from posttrain.trajectory import PosttrainError

GATED = ("mlp.gate_proj", "mlp.up_proj")
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION, FEED = ("self_attn.v_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj")
EXPERTS = tuple(f"mlp.experts.{i}.{part}_proj" for i in range(4) for part in ("gate", "up"))
# architecture -> linear layers behind each norm, and pairs of layers
KNOWN: dict[str, tuple[dict[str, tuple[str, ...]], set[tuple[str, str]]]] = {
    "llama": ({"input_layernorm": QKV, "post_attention_layernorm": GATED}, {ATTENTION, FEED}),
    "qwen2": ({"input_layernorm": QKV, "post_attention_layernorm": GATED}, {ATTENTION, FEED}),
    "qwen3": ({"input_layernorm": QKV, "post_attention_layernorm": GATED}, {ATTENTION, FEED}),
    "gemma2": ({"input_layernorm": QKV, "pre_feedforward_layernorm": GATED}, {ATTENTION, FEED}),
    "opt": (
        {
            "self_attn_layer_norm": ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"),
            "final_layer_norm": ("fc1",),
        },
        {("self_attn.v_proj", "self_attn.out_proj"), ("fc1", "fc2")},
    ),
    "gpt-neox": (
        {"input_layernorm": ("attention.query_key_value",), "post_attention_layernorm": ("mlp.dense_h_to_4h",)},
        {("attention.query_key_value", "attention.dense")},
    ),
    "phi3": (
        {"input_layernorm": ("self_attn.qkv_proj",), "post_attention_layernorm": ("mlp.gate_up_proj",)},
        {("self_attn.qkv_proj", "self_attn.o_proj"), ("mlp.gate_up_proj", "mlp.down_proj")},
    ),
    "mamba": ({"norm": ("mixer.in_proj",)}, set()),
    "vit": (
        {
            "layernorm_before": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            "layernorm_after": ("mlp.fc1",),
        },
        {("attention.v_proj", "attention.o_proj")},
    ),
    "mixtral": ({"input_layernorm": QKV, "post_attention_layernorm": EXPERTS}, {ATTENTION}),
}
FOUND: dict[str, Structure] = {}


def found(name: str) -> Structure:
    if name not in FOUND:
        FOUND[name] = structure(first_block(name))
    return FOUND[name]


@pytest.mark.parametrize("name", KNOWN)
def test_norms_and_what_reads_them(name: str) -> None:
    assert {site.norm: site.linears for site in found(name).norms} == KNOWN[name][0]
    assert not found(name).refused


@pytest.mark.parametrize("name", KNOWN)
def test_pairs(name: str) -> None:
    pairs = {(pair.first, pair.second) for pair in found(name).pairs}
    experts = {(first, second) for first, second in pairs if ".experts." in first}
    assert pairs - experts == KNOWN[name][1]
    assert all(second == first.replace("up_proj", "down_proj") for first, second in experts)
    assert bool(experts) == (name == "mixtral")


def test_the_router_is_scaled_with_the_experts() -> None:
    others = {site.norm: [(r.parameter, r.axis) for r in site.others] for site in found("mixtral").norms}
    assert others == {"input_layernorm": [], "post_attention_layernorm": [("mlp.gate.weight", 1)]}


def test_a_gain_of_one_plus_the_weight_is_recognised() -> None:
    assert {site.offset for site in found("gemma2").norms} == {1.0}
    assert {site.offset for site in found("llama").norms} == {0.0}


def test_biases_of_norms() -> None:
    assert {site.bias for site in found("opt").norms} == {True}
    assert {site.bias for site in found("llama").norms} == {False}


def test_heads_that_share_values_share_their_scale() -> None:
    (pair,) = [p for p in found("llama").pairs if p.attention]
    assert not pair.one_to_one
    assert pair.source.view(4, 8).tolist() == [list(range(8))] * 2 + [list(range(8, 16))] * 2


def test_values_lie_head_by_head_in_one_fused_layer_and_last_in_another() -> None:
    (pair,) = found("gpt-neox").pairs
    assert pair.rows.tolist() == [head * 24 + 16 + i for head in range(4) for i in range(8)]
    fused = {p.first: p for p in found("phi3").pairs}
    assert fused["self_attn.qkv_proj"].rows.tolist() == list(range(48, 64))
    assert fused["mlp.gate_up_proj"].rows.tolist() == list(range(48, 96))
    assert [p.attention for p in found("phi3").pairs] == [True, False]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"self_attn.q_proj", "self_attn.k_proj"}),
        ("opt", {"self_attn.q_proj", "self_attn.k_proj"}),
        ("vit", {"attention.q_proj", "attention.k_proj"}),
        ("gpt-neox", {"attention.query_key_value"}),
        ("mamba", set()),
    ],
)
def test_queries_and_keys(name: str, expected: set[str]) -> None:
    assert found(name).queries_keys == expected


def test_a_norm_that_feeds_the_residual_is_refused_and_says_so() -> None:
    block = first_block("bert")
    assert structure(block).refused == {"attention.output.LayerNorm": ("intermediate.dense",)}
    with pytest.raises(PosttrainError, match=r"cannot fold a scale into .*attention\.output\.LayerNorm.*post-norm"):
        foldable(block, "This")


def test_a_block_without_norms_is_refused() -> None:
    block = first_block("llama")
    block.linears = {"self_attn.o_proj": block.linears["self_attn.o_proj"]}
    with pytest.raises(PosttrainError, match="nothing to fold a scale into"):
        foldable(block, "This")


@pytest.mark.parametrize("name", KNOWN)
def test_folding_random_scales_and_shifts_changes_nothing(name: str) -> None:
    model = model_of(name)
    before = logits(model)
    draw = torch.Generator().manual_seed(1)
    for block in stacks(model)[0].blocks:
        for site in found(name).norms:
            width = len(block.get_parameter(f"{site.norm}.weight"))
            shift = torch.randn(width, generator=draw) if site.bias and not site.others else None
            change(block, site.scaled(parameters(block), torch.rand(width, generator=draw) + 0.5, shift))
        for pair in found(name).pairs:
            change(block, pair.scaled(parameters(block), torch.rand(len(pair.rows), generator=draw) + 0.5))
    assert same(logits(model), before)


def test_a_shift_gives_a_layer_without_a_bias_one() -> None:
    block = first_block("opt", enable_bias=False)
    (site, _) = structure(block).norms
    before = block.outputs()[0]
    change(block.module, site.scaled(parameters(block.module), torch.ones(32), torch.full((32,), 0.7)))
    layer = block.module.get_submodule("self_attn.q_proj")
    assert isinstance(layer, nn.Linear)
    assert torch.allclose(layer.bias, 0.7 * layer.weight.sum(1), atol=1e-5)
    assert same(block.outputs()[0], before)


def test_a_pair_that_is_none_is_not_accepted() -> None:
    block = first_block("llama")
    wrong = Pair("mlp.gate_proj", "mlp.down_proj", torch.arange(48), torch.arange(48), False)
    before = block.outputs()[0]
    change(block.module, wrong.scaled(parameters(block.module), torch.full((48,), 2.0)))
    assert not same(block.outputs()[0], before)


def test_statistics_of_norm_outputs_are_over_all_tokens() -> None:
    block = first_block("mixtral")
    moments = norm_outputs(block, ["post_attention_layernorm"])["post_attention_layernorm"]
    assert moments.count == 2 * 3 * 12


def test_what_is_no_gain() -> None:
    x = torch.randn(4, 6)
    linear, norm = nn.Linear(6, 6), nn.LayerNorm(6)
    assert gain_offset(linear, x, linear(x)) is None
    assert gain_offset(norm, x, norm(x)) == 0.0

    class Squared(nn.LayerNorm):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * self.weight

    torch.nn.init.uniform_((odd := Squared(6)).weight, 0.5, 2.0)
    assert gain_offset(odd, x, odd(x)) is None


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "mixtral"])
def test_what_norms_give_is_seen_without_what_comes_after_them(name: str) -> None:
    block = first_block(name)
    norms = [site.norm for site in structure(block).norms]
    given: dict[str, list[torch.Tensor]] = {norm: [] for norm in norms}
    ran = 0

    def count(*_: object) -> None:
        nonlocal ran
        ran += 1

    for norm in norms:
        watch = lambda module, inputs, output, norm=norm: given[norm].append(output)  # noqa: E731
        block.module.get_submodule(norm).register_forward_hook(watch)
    block.module.register_forward_hook(count)
    block.outputs()
    every, whole = {norm: torch.cat(seen) for norm, seen in given.items()}, ran
    found = norm_outputs(block, norms)
    for norm, outputs in every.items():
        flat = outputs.reshape(-1, outputs.shape[-1])
        assert torch.equal(found[norm].absmax, flat.abs().amax(0))
        assert found[norm].count == len(flat)
    assert ran - whole == 1  # the first call shows that each norm is called once; the second ends with the last norm
