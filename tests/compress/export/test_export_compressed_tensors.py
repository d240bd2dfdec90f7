"""Folders for `compressed-tensors`: the codes that are stored, and what `transformers` computes with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import bytes_of, greedy, logits, packed, plain, small_of, tiny, with_weights
from safetensors.torch import load_file
from torch import nn

from posttrain import export, load, methods
from posttrain.compress.activations.dynamic import Dynamic, DynamicStep
from posttrain.compress.activations.static import Static
from posttrain.compress.grids.restricted import Restricted
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.method import Compression
from posttrain.compress.packed.bits import pack
from posttrain.compress.packed.levels import LevelsWeight
from posttrain.compress.packed.linear import PackedLinear, TransformedLinear
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.compress.solvers.rtn import RoundToNearest, rounded
from posttrain.models.causal import CausalPolicy
from posttrain.trajectory import PosttrainError

CLOSE = {"rtol": 0, "atol": 2e-5}  # of fp32 logits of size 1 to 10


def exported(policy: CausalPolicy, folder: Path, **options: Any) -> Any:
    """The model that `transformers` loads from a folder that was exported."""
    from transformers import AutoModelForCausalLM

    export(policy, folder, "compressed-tensors", show=False, **options)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def described(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize(
    ("bits", "group", "zero"),
    [
        (2, 16, "integer"),
        (3, 16, "none"),
        (3, 16, "integer"),
        (4, 8, "none"),
        (4, 8, "integer"),
        (4, 0, "integer"),
        (5, 0, "none"),
        (6, 16, "integer"),
        (7, 16, "none"),
        (8, 0, "none"),
        (8, 16, "integer"),
    ],
)
def test_the_same_logits(tmp_path: Path, bits: int, group: int, zero: Any) -> None:
    small = small_of(tiny(), methods.rtn(bits=bits, group=group, zero=zero))
    other = exported(small, tmp_path / "out")
    torch.testing.assert_close(logits(other), logits(small), **CLOSE)
    assert (logits(tiny()) - logits(small)).abs().max() > 100 * CLOSE["atol"], "rounding shows"
    arguments = described(tmp_path / "out")["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert (arguments["num_bits"], arguments["symmetric"]) == (bits, zero == "none")
    assert (arguments["strategy"], arguments["group_size"]) == (("group", group) if group else ("channel", None))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "opt", "gpt-neox"])
def test_architectures(tmp_path: Path, architecture: str) -> None:
    """Tied embeddings (llama), biases (qwen2, opt, gpt-neox), fused layers (phi3)."""
    small = small_of(tiny(architecture))
    torch.testing.assert_close(logits(exported(small, tmp_path / "out")), logits(small), **CLOSE)


@pytest.mark.parametrize("method", [methods.gptq(bits=4, group=16, act_order=True), methods.awq(bits=4, group=16)])
def test_methods_that_use_data(tmp_path: Path, method: Compression) -> None:
    """Columns in the order of activation have static groups, and scales of channels are folded: nothing is added."""
    small = small_of(plain(), method)
    torch.testing.assert_close(logits(exported(small, tmp_path / "out")), logits(small), **CLOSE)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_codes_are_those_that_are_stored(tmp_path: Path, bits: int) -> None:
    """Bit for bit, as we pack them and as the library unpacks them."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    small = small_of(plain(), methods.gptq(bits=bits, group=16))
    export(small, tmp_path / "out", "compressed-tensors", show=False)
    state = load_file(tmp_path / "out" / "model.safetensors")
    for name, layer in packed(small).items():
        weight = layer.weight
        assert isinstance(weight, UniformWeight)
        words = state[f"{name}.weight_packed"]
        assert torch.equal(words.view(torch.uint8)[:, : weight.codes.shape[1]], weight.codes)
        shape = torch.Size(state[f"{name}.weight_shape"].tolist())
        assert shape == weight.shape
        half = 1 << (bits - 1)
        assert torch.equal(unpack_from_int32(words, bits, shape).int() + half, weight.unpacked().int())
        zeros = unpack_from_int32(state[f"{name}.weight_zero_point"], bits, weight.scale.shape, packed_dim=0)
        assert torch.equal(zeros.float() + half, weight.zeros())
        assert torch.equal(state[f"{name}.weight_scale"], weight.scale)


def test_the_folder_is_a_whole_model(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    small = small_of(plain())
    other = exported(small, tmp_path / "out")
    assert greedy(other) == greedy(small.model)
    text = "the theory of 12 <|im_end|>"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids == small.tokenizer(text).input_ids
    config = described(tmp_path / "out")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert config["quantization_config"]["format"] == "pack-quantized"
    assert config["quantization_config"]["config_groups"]["group_0"]["targets"] == ["Linear"]


def test_from_the_folder_that_quantize_wrote(tmp_path: Path) -> None:
    small = small_of(plain())
    folder = small.save(tmp_path / "small")
    found = export(folder, tmp_path / "out", "compressed-tensors", show=False)
    assert found.stored == {"W4 group 8, asymmetric": 14}
    export(small, tmp_path / "again", "compressed-tensors", show=False)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_it_is_as_large_as_its_bits(tmp_path: Path) -> None:
    policy = plain(hidden_size=256, intermediate_size=512)
    for bits, zero in ((4, "none"), (3, "integer")):
        small = small_of(policy, methods.rtn(bits=bits, group=64, zero=zero))  # type: ignore[arg-type]
        found = export(small, tmp_path / f"out{bits}", "compressed-tensors", dtype="f16", show=False)
        stored = sum(layer.weight.counted_bits / 8 for layer in packed(small).values())
        floats = 2 * sum(p.numel() for p in small.model.parameters())
        assert bytes_of(found.path) == pytest.approx(stored + floats, rel=0.03)
        assert found.bytes == sum(file.stat().st_size for file in found.path.iterdir())


@pytest.mark.parametrize(("dtype", "name"), [("f32", "float32"), ("bf16", "bfloat16"), ("f16", "float16")])
def test_the_precision_of_the_float_parts(tmp_path: Path, dtype: str, name: str) -> None:
    small = small_of(plain())
    other = exported(small, tmp_path / "out", dtype=dtype)
    assert described(tmp_path / "out")["dtype"] == name
    assert str(other.dtype) == f"torch.{name}"
    off = (logits(other) - logits(small)).abs().max() / logits(small).abs().max()
    assert off < {"f32": 1e-5, "bf16": 3e-2, "f16": 4e-3}[dtype]


def test_by_default_float_parts_are_exact_and_as_short_as_can_be(tmp_path: Path) -> None:
    policy = plain()
    folder = load(policy.save(tmp_path / "float"), precision="bf16").save(tmp_path / "half")
    small = small_of(load(folder, precision="fp32"))
    export(small, tmp_path / "out", "compressed-tensors", show=False)
    assert described(tmp_path / "out")["dtype"] == "bfloat16"
    state = load_file(tmp_path / "out" / "model.safetensors")
    embedding = state["model.embed_tokens.weight"]
    assert embedding.dtype == torch.bfloat16
    assert torch.equal(embedding.float(), small.model.get_input_embeddings().weight)
    assert state["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.float16, "scales stay as they are"
    export(small_of(policy), tmp_path / "fp32", "compressed-tensors", show=False)
    assert described(tmp_path / "fp32")["dtype"] == "float32"


# -- beside the common case --------------------------------------------------------------------------------------------


def test_skipped_layers_are_ignored(tmp_path: Path) -> None:
    small = small_of(plain(), skip=["*.up_proj", "model.layers.1.*"])
    other = exported(small, tmp_path / "out")
    ignored = described(tmp_path / "out")["quantization_config"]["ignore"]
    assert "model.layers.0.mlp.up_proj" in ignored
    assert "model.layers.1.self_attn.q_proj" in ignored
    assert "model.layers.0.mlp.down_proj" not in ignored
    torch.testing.assert_close(logits(other), logits(small), **CLOSE)


def test_layers_of_different_bits_are_groups_by_name(tmp_path: Path) -> None:
    policy = plain()
    weight = policy.model.model.layers[0].mlp.up_proj.weight.detach()
    three = rounded(weight, Uniform(3, 16, "none"), "up")
    small = with_weights(small_of(policy, methods.rtn(bits=4, group=8, zero="none")), up_proj=three)
    other = exported(small, tmp_path / "out")
    groups = described(tmp_path / "out")["quantization_config"]["config_groups"]
    assert [len(group["targets"]) for group in groups.values()] == [13, 1]
    assert groups["group_1"]["targets"] == ["model.layers.0.mlp.up_proj"]
    torch.testing.assert_close(logits(other), logits(small), **CLOSE)


@pytest.mark.parametrize("zero", ["none", "integer"])
@pytest.mark.parametrize("tied", [True, False])
def test_layers_that_one_group_covers_are_of_groups_beside_others_that_have_several(
    tmp_path: Path, tied: bool, zero: Any
) -> None:
    """32 columns in most layers and 64 in one: with zero points `transformers` loads a single scheme alone."""
    small = small_of(plain(tie_word_embeddings=tied), methods.rtn(bits=4, group=32, zero=zero))
    other = exported(small, tmp_path / "out")
    torch.testing.assert_close(logits(other), logits(small), **CLOSE)
    (group,) = described(tmp_path / "out")["quantization_config"]["config_groups"].values()
    assert (group["weights"]["strategy"], group["weights"]["group_size"]) == ("group", 32)


def test_groups_wider_than_some_layers(tmp_path: Path) -> None:
    """Two widths: without zero points each layer as it is, with them nothing that transformers would load."""
    policy = plain(hidden_size=48, intermediate_size=128)
    small = small_of(policy, methods.rtn(bits=4, group=64, zero="none"))
    torch.testing.assert_close(logits(exported(small, tmp_path / "out")), logits(small), **CLOSE)
    with pytest.raises(
        PosttrainError, match=r"q_proj has one group of all its 48 columns beside layers with groups of 64"
    ):
        export(small_of(policy, methods.rtn(bits=4, group=64)), tmp_path / "no", "compressed-tensors", show=False)


def test_levels_between_powers_of_two_keep_their_codes(tmp_path: Path) -> None:
    """Two schemes with zero points, each layer by the library's own decompression."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    codes = torch.randint(0, 5, (64, 32), generator=torch.Generator().manual_seed(1))
    levels = LevelsWeight.of(codes, torch.full((64, 2), 0.25), torch.randint(0, 5, (64, 2)), 5)
    small = with_weights(small_of(plain()), up_proj=levels)
    export(small, tmp_path / "out", "compressed-tensors", show=False)
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(state["model.layers.0.mlp.up_proj.weight_packed"].view(torch.uint8), pack(codes, 3))
    config = QuantizationConfig.model_validate(described(tmp_path / "out")["quantization_config"])
    by_layer = {name: scheme for scheme in config.config_groups.values() for name in scheme.targets}
    for name, layer in packed(small).items():
        own = {n.removeprefix(f"{name}."): t for n, t in state.items() if n.startswith(f"{name}.")}
        scheme = by_layer[name]
        found = BaseCompressor.get_value_from_registry(scheme.format).decompress(own, scheme)
        assert torch.equal(found["weight"].float(), layer.weight.dequantize()), name


def test_fp8(tmp_path: Path) -> None:
    small = small_of(plain(), methods.fp8())
    other = exported(small, tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert state["model.layers.0.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert described(tmp_path / "out")["quantization_config"]["format"] == "float-quantized"
    torch.testing.assert_close(logits(other), logits(small), **CLOSE)


# -- activations -------------------------------------------------------------------------------------------------------


class LibraryStep(nn.Module):
    """Symmetric rounding as the library has it when it runs in Python: its step is max|x| / 127.5, where ours and those
    of vLLM's kernels are max|x| / 127.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127.5
        return torch.round((x / scale).clamp(-128, 127)) * scale


def by_the_library(policy: CausalPolicy) -> CausalPolicy:
    for layer in packed(policy).values():
        assert layer.inputs is not None
        assert isinstance(layer.inputs[0], DynamicStep)
        layer.inputs = nn.Sequential(LibraryStep())
    return policy


@pytest.mark.parametrize("bits", [8, 4])
def test_activations_of_eight_bits_by_token(tmp_path: Path, bits: int) -> None:
    small = small_of(plain(), methods.smoothquant(bits=bits))
    other = exported(small, tmp_path / "out")
    group = described(tmp_path / "out")["quantization_config"]["config_groups"]["group_0"]
    assert group["format"] == "int-quantized"
    assert group["input_activations"] == {
        "num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "dynamic": True, "strategy": "token",
    }  # fmt: skip
    weight = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    stored = packed(small)["model.layers.0.mlp.up_proj"].weight
    assert isinstance(stored, UniformWeight)
    assert torch.equal(weight.int() + (1 << (bits - 1)), stored.unpacked().int())
    found, ours = logits(other), logits(small)
    assert (found - ours).abs().max() < 0.1 * ours.abs().max()
    torch.testing.assert_close(found, logits(by_the_library(small)), **CLOSE)


@pytest.mark.parametrize(
    "activations", [Dynamic(8, symmetric=False), Static(8), Static(8, symmetric=False)], ids=["token", "static", "zero"]
)
def test_other_activations_of_eight_bits(tmp_path: Path, activations: Any) -> None:
    method = Compression("w8a8", RoundToNearest(Restricted(8)), activations=activations)
    small = small_of(plain(), method)
    torch.testing.assert_close(logits(exported(small, tmp_path / "out")), logits(small), rtol=0, atol=1e-3)


# -- what cannot be exported -------------------------------------------------------------------------------------------


def with_own_groups() -> CausalPolicy:
    codes = torch.randint(0, 16, (64, 32), generator=torch.Generator().manual_seed(1))
    made = UniformWeight.of(codes, torch.ones(64, 2), torch.ones(64, 2), 4, "integer", torch.arange(32) % 2)
    return with_weights(small_of(plain()), up_proj=made)


def with_step(small: CausalPolicy) -> CausalPolicy:
    block = small.model.model.layers[0]
    block.mlp.up_proj = TransformedLinear.of(nn.Linear(32, 64, bias=False), nn.Sequential(DynamicStep(32)))
    return small


def with_bias(small: CausalPolicy) -> CausalPolicy:
    layer = small.model.model.layers[0].mlp.up_proj
    small.model.model.layers[0].mlp.up_proj = PackedLinear(layer.weight, torch.ones(64))
    return small


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (plain, r"tiny is not quantized, and compressed-tensors is a format for quantized models; quantize it first"),
        (lambda: small_of(plain(), methods.vptq(bits=2)), r"in the format 'vector' \(vptq\); compressed-tensors holds"),
        (lambda: small_of(plain(), methods.ptqtp(group=16)), r"q_proj is stored in the format 'ternary' \(ptqtp\)"),
        (lambda: small_of(plain(), methods.nf4(group=16)), r"in the format 'table' \(nf4\)"),
        (lambda: small_of(plain(), methods.wanda()), r"in the format 'sparse' \(wanda\)"),
        (lambda: small_of(plain(), methods.rtn(bits=4, group=8, zero="float")), r"in 4 bits with float zero points"),
        (lambda: small_of(plain(), methods.rtn(bits=1, group=8)), r"is stored in 1 bits \(rtn\)"),
        (lambda: small_of(plain(), methods.fp8(kind="e5m2")), r"is stored as E5M2 with 1 groups a row \(fp8\)"),
        (lambda: small_of(plain(), methods.fp8(group=16)), r"is stored as E4M3 with 2 groups a row \(fp8\)"),
        (lambda: small_of(plain(), methods.quarot()), r"the inputs of .* go through a step of kind '.*' .*\(quarot\)"),
        (
            lambda: small_of(plain(), methods.smoothquant(ranges="tensor")),
            r"step of kind 'dynamic' as the model runs \(smoothquant\); compressed-tensors holds integer activations",
        ),
        (lambda: small_of(tiny("mixtral")), r"mlp\.experts is a module of posttrain's own, Experts \(rtn\), which"),
        (with_own_groups, r"up_proj has groups that are no runs of columns \(rtn\)"),
        (lambda: with_step(small_of(plain())), r"no such step before a float layer"),
        (lambda: with_bias(small_of(plain())), r"up_proj\.bias is a parameter that the method added and a plain llama"),
    ],
)  # fmt: skip
def test_what_the_format_does_not_hold(tmp_path: Path, make: Callable[[], CausalPolicy], message: str) -> None:
    with pytest.raises(PosttrainError, match=message) as raised:
        export(make(), tmp_path / "out", "compressed-tensors", show=False)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_attention_to_few_tokens(tmp_path: Path) -> None:
    sparse = small_of(tiny(num_hidden_layers=3), methods.double_sparsity(tokens=8, factor=2))
    mixed = replace(methods.rtn(bits=4, group=8), attention=methods.double_sparsity(tokens=8, factor=2).attention)
    with pytest.raises(PosttrainError, match="is not quantized"):
        export(sparse, tmp_path / "out", "compressed-tensors", show=False)
    with pytest.raises(PosttrainError, match=r"is a module of posttrain's own, ChosenTokens \(rtn\), which"):
        export(small_of(tiny(num_hidden_layers=3), mixed), tmp_path / "out", "compressed-tensors", show=False)


def test_values_beyond_half_precision(tmp_path: Path) -> None:
    small = small_of(plain())
    with torch.no_grad():
        small.model.model.norm.weight[0] = 1e5
    with pytest.raises(PosttrainError, match=r"model\.norm\.weight holds values beyond half precision"):
        export(small, tmp_path / "out", "compressed-tensors", dtype="f16", show=False)


@pytest.mark.parametrize("dtype", [None, "f32", "bf16", "f16"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite(tmp_path: Path, value: float, dtype: str | None) -> None:
    small = small_of(plain())
    with torch.no_grad():
        small.model.model.norm.weight[0] = value
    with pytest.raises(PosttrainError, match=r"model\.norm\.weight holds values that are not finite; repair or train"):
        export(small, tmp_path / "out", "compressed-tensors", dtype=dtype, show=False)
    assert not (tmp_path / "out").exists()


def test_values_beyond_bf16(tmp_path: Path) -> None:
    small = small_of(plain())
    with torch.no_grad():
        small.model.model.norm.weight[0] = torch.finfo(torch.float32).max
    with pytest.raises(
        PosttrainError, match=r"model\.norm\.weight holds values beyond the range of .*expected --dtype f32"
    ):
        export(small, tmp_path / "out", "compressed-tensors", dtype="bf16", show=False)


def test_mistakes_are_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text").write_text("precious")
    for path, format, dtype, message in (
        ("out", "compresed-tensors", None, r"unknown format 'compresed-tensors'; did you mean compressed-tensors"),
        (
            "out",
            "compressed-tensors",
            "q8_0",
            r"dtype 'q8_0' is no type of compressed-tensors; expected f32, f16, bf16",
        ),
        ("thesis", "compressed-tensors", None, r"thesis exists already; choose another folder"),
        ("thesis", "gguf", None, r"thesis exists already; choose another file"),
    ):
        with pytest.raises(PosttrainError, match=message):
            export("no-such-model", tmp_path / path, format, dtype=dtype)
    assert (tmp_path / "thesis" / "text").read_text() == "precious"


def test_a_merged_adapter_is_no_quantized_model(tmp_path: Path) -> None:
    from posttrain.models.adapters import add_lora

    with pytest.raises(PosttrainError, match="is not quantized"):
        export(add_lora(plain()), tmp_path / "out", "compressed-tensors", show=False)


def test_the_library_takes_the_configuration(tmp_path: Path) -> None:
    """Every field is one that the library knows, and no tensor is left over or missing."""
    from compressed_tensors.quantization import QuantizationConfig
    from transformers import AutoModelForCausalLM

    export(small_of(plain(), methods.smoothquant()), tmp_path / "out", "compressed-tensors", show=False)
    config = QuantizationConfig.model_validate(described(tmp_path / "out")["quantization_config"])
    assert config.quantization_status == "compressed"
    _, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
