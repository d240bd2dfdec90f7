"""Quantization behind transforms: each method equals something known in a limit, and does what it is for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from block_models import batches_of, logits, model_of, transform
from conftest import make_model
from posttrain import methods
from posttrain.compress.activations.dynamic import Dynamic
from posttrain.compress.activations.static import Static
from posttrain.compress.fold import change, parameters
from posttrain.compress.grids.restricted import Restricted
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.method import Compression
from posttrain.compress.packed.linear import PackedLinear, TransformedLinear
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.compress.pipeline import compress_model
from posttrain.compress.solvers.gptq import GPTQ
from posttrain.compress.solvers.rtn import RoundToNearest
from posttrain.compress.stacks import stacks
from posttrain.compress.structure import structure
from posttrain.compress.transforms.hadamard import hadamard
from posttrain.compress.transforms.rotation import rotation_matrix
from posttrain.compress.transforms.smooth import SmoothQuant
from posttrain.compress.walk import Walk
from posttrain.models.causal import CausalPolicy


def compressed(model: nn.Module, method: Compression, rows: int = 3, skip: tuple[str, ...] = ()) -> nn.Module:
    made = copy.deepcopy(model)
    compress_model(made, method, batches_of(made, rows), skip=skip)
    return made


def packed(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Codes and scales of packed layers by name."""
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear) and name.startswith(prefix)
        for key, value in module.weight.state_dict().items()
    }


def alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return bool(one) and one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def uneven(name: str = "llama") -> nn.Module:
    """The same function with three channels of each norm's output thirty times as large; the norms' readers undo it."""
    model = model_of(name)
    for block in Walk(model, stacks(model)[0], batches_of(model)):
        for site in structure(block).norms:
            scale = torch.ones(32)
            scale[[3, 10, 20]] = 1 / 30
            change(block.module, site.scaled(parameters(block.module), scale))
    return model


def error(model: nn.Module, method: Compression, skip: tuple[str, ...] = ()) -> float:
    """Of the logits of tokens that nothing was calibrated on, relative."""
    before = logits(model)
    return float((logits(compressed(model, method, rows=16, skip=skip)) - before).norm() / before.norm())


# -- limits


@pytest.mark.limit("smoothquant")
@pytest.mark.parametrize("ranges", ["token", "tensor", "static"])
def test_smoothquant_of_even_activations_is_rounding_to_nearest(ranges: Any) -> None:
    # with alpha 1 all channels get a largest input of 1; doing so twice is doing it once
    model = model_of("llama")
    transform(model, [SmoothQuant(1.0)])
    activations = Static(6) if ranges == "static" else Dynamic(6, per=ranges)
    plain = Compression("rtn", RoundToNearest(Restricted(5, 0)), activations=activations)
    found = compressed(model, methods.smoothquant(5, activation_bits=6, alpha=1.0, ranges=ranges))
    first = "model.layers.0"  # the second block's inputs are other ones once the first is rounded
    assert alike(packed(found, first), packed(compressed(model, plain), first))


@pytest.mark.limit("smoothquant")
def test_smoothquant_by_the_paper_on_the_first_layer() -> None:
    """Codes of q_proj from equations written here: s from inputs and weights, then amax / 127."""
    model: Any = model_of("llama")
    layer, norm = model.model.layers[0].self_attn, model.model.layers[0].input_layernorm
    x = torch.cat([norm(model.model.embed_tokens(b["input_ids"])).reshape(-1, 32) for b in batches_of(model)])
    largest = torch.stack([getattr(layer, f"{p}_proj").weight.abs().amax(0) for p in "qkv"]).amax(0)
    s = x.abs().amax(0) ** 0.5 / largest**0.5
    weight = layer.q_proj.weight * s
    scale = (weight.abs().amax(1, keepdim=True) / 127).half().float()
    found = compressed(model, methods.smoothquant()).get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(found, PackedLinear)
    assert isinstance(found.weight, UniformWeight)
    codes = found.weight.unpacked().float() - 128
    assert (codes - torch.round(weight / scale)).abs().max() <= 1  # a last digit may tip a tie
    assert float((codes == torch.round(weight / scale)).float().mean()) > 0.99
    assert codes.abs().max() == 127


@pytest.mark.limit("awq")
@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_awq_without_a_scale_is_rounding_to_nearest(name: str) -> None:
    plain = compressed(model_of(name), methods.rtn(3, 16))
    assert alike(packed(compressed(model_of(name), methods.awq(3, 16, points=1, clip=False))), packed(plain))


@pytest.mark.limit("os+")
def test_os_plus_without_shift_and_scale_is_rounding_to_nearest() -> None:
    plain = Compression("rtn", RoundToNearest(Restricted(6, 0)), activations=Static(6))
    found = compressed(model_of("opt"), methods.os_plus(6, activation_bits=6, shift=False, lower=1e4))
    expected = compressed(model_of("opt"), plain)
    assert alike(packed(found), packed(expected))
    assert torch.equal(logits(found), logits(expected))


@pytest.mark.limit("crossquant")
def test_crossquant_with_alpha_1_is_rounding_by_the_token() -> None:
    plain = Compression("rtn", RoundToNearest(Restricted(8, 0)), activations=Dynamic(4))
    for folded in (False, True):
        found = compressed(model_of("llama"), methods.crossquant(activation_bits=4, alpha=1.0, folded=folded))
        assert torch.equal(logits(found), logits(compressed(model_of("llama"), plain)))


@pytest.mark.limit("quarot")
def test_quarot_rotates_as_the_paper_says() -> None:
    """Every weight of a tiny Llama, rotated here with whole matrices."""
    model: Any = model_of("llama", tie_word_embeddings=False)
    rotated: Any = copy.deepcopy(model)
    transform(rotated, methods.quarot(seed=5).transforms)
    q, d = rotation_matrix(32, seed=5).float(), hadamard(8).float() / 8**0.5
    across, whole = torch.kron(hadamard(4).float() / 2, torch.eye(8)), hadamard(48).float() / 48**0.5
    heads, shared = torch.block_diag(*[d] * 4), torch.block_diag(*[d] * 2)

    def same(found: Tensor, wanted: Tensor) -> bool:
        return torch.allclose(found, wanted, atol=1e-5)

    assert same(rotated.model.embed_tokens.weight, model.model.embed_tokens.weight @ q)
    assert same(rotated.lm_head.weight, model.lm_head.weight * model.model.norm.weight @ q)
    for now, was in zip(rotated.model.layers, model.model.layers, strict=True):
        before, behind = was.input_layernorm.weight, was.post_attention_layernorm.weight
        assert same(now.self_attn.q_proj.weight, was.self_attn.q_proj.weight * before @ q)
        assert same(now.self_attn.v_proj.weight, shared @ (was.self_attn.v_proj.weight * before @ q))
        assert same(now.self_attn.o_proj.weight, q.T @ was.self_attn.o_proj.weight @ heads.T @ across.T)
        assert same(now.mlp.gate_proj.weight, was.mlp.gate_proj.weight * behind @ q)
        assert same(now.mlp.down_proj.weight, q.T @ was.mlp.down_proj.weight @ whole.T)


@pytest.mark.limit("quarot")
def test_quarot_without_rotation_is_gptq_with_rounded_activations() -> None:
    method = methods.quarot()
    plain = Compression("gptq", GPTQ(Restricted(4, 0, clip="mse")), activations=Dynamic(4, clip=0.9))
    without = method.replace(transforms=())
    assert alike(packed(compressed(model_of("llama"), without)), packed(compressed(model_of("llama"), plain)))


# -- what they are for


def test_smoothquant_crossquant_and_os_plus_undo_what_large_channels_do() -> None:
    model = uneven()
    plain = Compression("rtn", RoundToNearest(Restricted(8, 0)), activations=Dynamic(6))
    fixed = Compression("rtn", RoundToNearest(Restricted(8, 0)), activations=Static(6))
    assert error(model, methods.smoothquant(activation_bits=6)) < 0.5 * error(model, plain)
    assert error(model, methods.crossquant(activation_bits=6)) < 0.7 * error(model, plain)
    assert error(model, methods.os_plus(activation_bits=6)) < 0.5 * error(model, fixed)


def test_awq_loses_less_than_rounding_to_nearest_where_channels_matter_unequally() -> None:
    model = uneven()
    assert error(model, methods.awq(3, 16)) < 0.9 * error(model, methods.rtn(3, 16))


def test_quarot_loses_less_than_its_parts_without_rotation() -> None:
    model = uneven()
    method = methods.quarot()
    assert error(model, method) < 0.7 * error(model, method.replace(transforms=()))


@pytest.mark.parametrize("name", ["opt", "mixtral", "mamba"])
def test_methods_run_on_other_architectures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.compress.transforms.shift.STEPS", 3)
    made = [methods.smoothquant(), methods.awq(8, 0, points=2), methods.os_plus(), methods.crossquant(folded=True)]
    for method in [*made, methods.quarot(8, activation_bits=8, clip=1.0)]:
        # Mamba uses the weight of dt_proj without calling the layer, so that its inputs are never met
        skip = ("*.dt_proj",) if name == "mamba" else ()
        assert error(model_of(name), method, skip) < 0.15, method.name


def test_vision() -> None:
    for method in (methods.smoothquant(), methods.awq(8, 0, points=2), methods.crossquant()):
        assert error(model_of("vit"), method) < 0.1


# -- what is stored


def test_a_rotated_model_is_written_and_read(tiny_tokenizer: Any, tmp_path: Path) -> None:
    from posttrain.compress.policy import compressed_copy
    from posttrain.models.load import load

    policy = CausalPolicy(make_model(), tiny_tokenizer)
    tokens = torch.arange(3, 43).view(2, 20)
    small = compressed_copy(policy, methods.quarot(group=16), [{"input_ids": tokens}], skip=("*.0.mlp.down_proj",))
    left = small.model.model.layers[0].mlp.down_proj
    assert not isinstance(left, PackedLinear | TransformedLinear)
    again = load(str(small.save(tmp_path / "small")), precision="fp32")
    with torch.no_grad():
        assert torch.equal(again.model(tokens).logits, small.model(tokens).logits)
    assert again.model.config.tie_word_embeddings is False
    assert policy.model.lm_head.weight is policy.model.model.embed_tokens.weight


def test_a_restricted_grid_holds_its_largest_weight_and_is_packed_as_a_uniform_one() -> None:
    weight = torch.tensor([[2.0, -0.9, 0.3, -2.0]])
    levels = Restricted(3, 0).fit(weight)  # s = 2 / 3
    assert levels.nearest(weight).tolist() == [[7, 3, 4, 1]]
    assert torch.allclose(levels.rounded(weight), torch.tensor([[2.0, -2 / 3, 0.0, -2.0]]), atol=1e-3)
    found = Restricted(3, 0).pack(levels.nearest(weight), [levels])
    assert torch.equal(found.dequantize(), levels.rounded(weight))
    wide = torch.randn(64, 256)
    grid = Restricted(4, 64)
    groups = [grid.fit(part) for part in wide.split(64, 1)]
    stored = grid.pack(torch.cat([g.nearest(p) for g, p in zip(groups, wide.split(64, 1), strict=True)], 1), groups)
    assert stored.counted_bits == stored.stored_bytes * 8 == 64 * (256 * 4 + 4 * 16)
    assert float((Uniform(4, 64, "none").fit(wide).rounded(wide) - wide).norm()) > 0
