"""GGUF files: read back by the `gguf` package and by `transformers`, with the codes that are stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from exporting import ROWS, greedy, logits, packed, plain, small_of, tiny, with_weights

from conftest import CHAT_TEMPLATE, make_tokenizer
from posttrain import export, load, methods
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.models.causal import CausalPolicy
from posttrain.trajectory import PosttrainError

CLOSE = {"rtol": 0, "atol": 5e-5}  # of fp32 logits of size 1 to 10


def exported(policy: CausalPolicy, file: Path, **options: Any) -> Any:
    """The model that `transformers` loads from a file that was exported."""
    from transformers import AutoModelForCausalLM

    export(policy, file, "gguf", show=False, **options)
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def tensors(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def values(tensor: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))


def turned(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys as llama.cpp has them: channel i and channel i + half of a head side by side."""
    by_head = weight.unflatten(0, (heads, -1))
    half = by_head.shape[1] // 2
    pairs = [torch.stack([head[i], head[i + half]]) for head in by_head for i in range(half)]
    return torch.cat(pairs)


def with_half_lows(weight: Any) -> UniformWeight:
    """The same codes and scales with the smallest value of each group as Q4_1 has it, rounded to half precision."""
    low = (-weight.scale.float() * weight.zeros()).half()
    return UniformWeight.of(weight.unpacked(), weight.scale, low, weight.bits, "float")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
def test_float_models(tmp_path: Path, architecture: str) -> None:
    """Tied embeddings and turned rows (llama), biases (qwen2), normed queries and keys (qwen3)."""
    wide = {"head_dim": 128} if architecture == "qwen3" else {}  # what the reader takes for granted
    policy = tiny(architecture, **{"sliding_window": None, **wide})
    other = exported(policy, tmp_path / "model.gguf")
    torch.testing.assert_close(logits(other), logits(policy), **CLOSE)
    assert greedy(other) == greedy(policy.model)


@pytest.mark.parametrize(
    ("bits", "group", "zero", "kind"),
    [
        (4, 32, "none", "Q4_0"),
        (4, 32, "float", "Q4_1"),
        (4, 32, "integer", "Q4_1"),
        (4, 64, "none", "Q4_0"),  # a scale for two blocks
        (4, 0, "integer", "Q4_1"),
        (3, 32, "integer", "Q4_0"),  # never further than 7 from the zero point
        (2, 32, "float", "Q4_1"),
        (8, 32, "none", "Q8_0"),
        (6, 0, "integer", "Q8_0"),
    ],
)
def test_quantized_models(tmp_path: Path, bits: int, group: int, zero: Any, kind: str) -> None:
    small = small_of(plain(hidden_size=64, intermediate_size=128), methods.rtn(bits=bits, group=group, zero=zero))
    file = tmp_path / "model.gguf"
    other = exported(small, file)
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors(file).items()}
    assert {kinds[f"blk.{i}.{n}.weight"] for i in (0, 1) for n in ("attn_q", "attn_output", "ffn_down")} == {kind}
    assert kinds["token_embd.weight"] == "F32"
    assert greedy(other) == greedy(small.model)
    if kind == "Q4_1" and zero == "integer":
        assert (logits(other) - logits(small)).abs().max() < 0.005 * logits(small).abs().max()
        for layer in packed(small).values():
            layer.weight = with_half_lows(layer.weight)
    torch.testing.assert_close(logits(other), logits(small), **CLOSE)


@pytest.mark.parametrize("zero", ["none", "integer", "float"])
def test_codes_and_scales_are_those_that_are_stored(tmp_path: Path, zero: Any) -> None:
    """Read from the blocks of the file by hand."""
    small = small_of(plain(), methods.gptq(bits=4, group=32, zero=zero))
    file = tmp_path / "model.gguf"
    export(small, file, "gguf", show=False)
    found = tensors(file)
    for ours, theirs, heads in (("self_attn.q_proj", "attn_q", 4), ("mlp.down_proj", "ffn_down", 0)):
        weight = packed(small)[f"model.layers.1.{ours}"].weight
        assert isinstance(weight, UniformWeight)
        order = (lambda t, h=heads: turned(t, h)) if heads else (lambda t: t)
        tensor = found[f"blk.1.{theirs}.weight"]
        beside = 1 if tensor.tensor_type == gguf.GGMLQuantizationType.Q4_0 else 2
        blocks = torch.from_numpy(np.array(tensor.data)).reshape(weight.shape[0], -1, 16 + 2 * beside)
        nibbles = blocks[..., 2 * beside :]
        codes = torch.cat([nibbles & 15, nibbles >> 4], -1).reshape(weight.shape)
        scale = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
        assert torch.equal(codes, order(weight.unpacked()))
        assert torch.equal(scale, order(weight.scale))
        exact = order(weight.dequantize())
        if zero == "integer":
            step = scale.float().repeat_interleave(32, 1)
            assert ((values(tensor) - exact).abs() <= step * 15 * 2.0**-11).all()
        else:
            assert torch.equal(values(tensor), exact)


@pytest.mark.parametrize(
    ("dtype", "kind", "off"), [("f16", "F16", 4e-3), ("bf16", "BF16", 2e-2), ("q8_0", "Q8_0", 5e-2)]
)
def test_types_that_are_asked_for(tmp_path: Path, dtype: str, kind: str, off: float) -> None:
    policy = plain()
    file = tmp_path / "model.gguf"
    other = exported(policy, file, dtype=dtype)
    assert {t.tensor_type.name for t in tensors(file).values() if len(t.shape) > 1} == {kind}
    assert {t.tensor_type.name for t in tensors(file).values() if len(t.shape) == 1} == {"F32"}
    assert (logits(other) - logits(policy)).abs().max() < off * logits(policy).abs().max()


def test_a_model_in_bf16_stays_as_it_is(tmp_path: Path) -> None:
    half = load(plain().save(tmp_path / "float"), precision="bf16").save(tmp_path / "half")
    found = export(half, tmp_path / "model.gguf", "gguf", show=False)
    assert found.stored == {"BF16": 15}
    again = load(tmp_path / "model.gguf", precision="fp32")
    torch.testing.assert_close(logits(again), logits(load(half, precision="fp32")), **CLOSE)


def test_a_type_that_is_asked_for_leaves_codes_alone(tmp_path: Path) -> None:
    """It is for the rest: embeddings, and layers whose codes GGUF does not hold."""
    small = small_of(plain(), methods.rtn(bits=4, group=32, zero="none"))
    found = export(small, tmp_path / "a.gguf", "gguf", dtype="q8_0", show=False)
    assert found.stored == {"Q4_0": 14, "Q8_0": 1}
    narrow = small_of(plain(), methods.rtn(bits=4, group=16))
    other = exported(narrow, tmp_path / "b.gguf", dtype="f16")
    assert (logits(other) - logits(narrow)).abs().max() < 4e-3 * logits(narrow).abs().max()
    odd = plain(intermediate_size=48)
    assert export(odd, tmp_path / "c.gguf", "gguf", dtype="q8_0", show=False).stored == {"Q8_0": 13, "F16": 2}


def test_from_the_folder_that_quantize_wrote(tmp_path: Path) -> None:
    small = small_of(plain(), methods.rtn(bits=4, group=32, zero="none"))
    found = export(small.save(tmp_path / "small"), tmp_path / "deep" / "model.gguf", "gguf", show=False)
    assert found.stored == {"Q4_0": 14, "F32": 1}
    torch.testing.assert_close(logits(load(found.path, precision="fp32")), logits(small), **CLOSE)
    assert [file.name for file in found.path.parent.iterdir()] == ["model.gguf"]


def test_it_is_as_large_as_its_bits(tmp_path: Path) -> None:
    small = small_of(plain(hidden_size=256, intermediate_size=512), methods.rtn(bits=4, group=32, zero="none"))
    found = export(small, tmp_path / "model.gguf", "gguf", dtype="f16", show=False)
    weights = sum(layer.weight.shape[0] * layer.weight.shape[1] for layer in packed(small).values())
    floats = sum(p.numel() * (2 if p.ndim > 1 else 4) for p in small.model.parameters())
    assert found.bytes == found.path.stat().st_size == pytest.approx(4.5 * weights / 8 + floats, rel=0.03)


def test_what_the_file_says(tmp_path: Path) -> None:
    small = small_of(plain(), methods.rtn(bits=4, group=32, zero="none"))
    export(small, tmp_path / "model.gguf", "gguf", show=False)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    for name, expected in (
        ("general.architecture", "llama"),
        ("general.type", "model"),
        ("general.file_type", int(gguf.LlamaFileType.MOSTLY_Q4_0)),
        ("general.quantization_version", gguf.GGML_QUANT_VERSION),
        ("llama.block_count", 2),
        ("llama.context_length", 256),
        ("llama.embedding_length", 32),
        ("llama.feed_forward_length", 64),
        ("llama.attention.head_count", 4),
        ("llama.attention.head_count_kv", 2),
        ("llama.attention.key_length", 8),
        ("llama.rope.dimension_count", 8),
        ("llama.rope.freq_base", 10000.0),
        ("llama.vocab_size", ROWS),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "gpt-2"),
        ("tokenizer.ggml.bos_token_id", 1),
        ("tokenizer.ggml.eos_token_id", 2),
        ("tokenizer.ggml.add_bos_token", False),
        ("tokenizer.chat_template", CHAT_TEMPLATE),
    ):
        assert said[name] == expected, name
    assert said["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    tokens, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == ROWS
    assert (tokens[1], kinds[1]) == ("<|im_start|>", gguf.TokenType.CONTROL)
    assert (tokens[-1], kinds[-1]) == (f"[PAD{ROWS - 1}]", gguf.TokenType.UNUSED)
    assert said["tokenizer.ggml.merges"] == ["t h", "th e", "Ġ the", "1 2"]


# -- what cannot be exported -------------------------------------------------------------------------------------------


def with_own_groups() -> CausalPolicy:
    codes = torch.randint(0, 16, (64, 32), generator=torch.Generator().manual_seed(1))
    made = UniformWeight.of(codes, torch.ones(64, 2), torch.ones(64, 2), 4, "integer", torch.arange(32) % 2)
    return with_weights(small_of(plain(), methods.rtn(bits=4, group=32)), up_proj=made)


def unscaled() -> CausalPolicy:
    codes = torch.randint(0, 16, (64, 32), generator=torch.Generator().manual_seed(1))
    made = UniformWeight.of(codes, torch.full((64, 1), 6e4), torch.full((64, 1), 9), 4, "integer")
    return with_weights(small_of(plain(), methods.rtn(bits=4, group=32)), up_proj=made)


@pytest.mark.parametrize("dtype", [None, "f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_values_that_are_not_finite(tmp_path: Path, name: str, value: float, dtype: str | None) -> None:
    policy = plain()
    policy.model.get_parameter(name).data.flatten()[3] = value
    with pytest.raises(PosttrainError, match=rf"^{name} holds values that are not finite; repair or train"):
        export(policy, tmp_path / "out.gguf", "gguf", dtype=dtype, show=False)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        ("q8_0", 127 * 65600.0, r"whose scales are beyond half precision \(65504\); expected --dtype bf16 or f32"),
        ("bf16", torch.finfo(torch.float32).max, r"beyond the range of torch\.bfloat16; expected --dtype f32"),
    ],
)
def test_values_beyond_a_type(tmp_path: Path, dtype: str, value: float, message: str) -> None:
    policy = plain()
    weight = policy.model.model.layers[0].mlp.up_proj.weight.data
    weight[0, 0] = value
    with pytest.raises(PosttrainError, match=rf"^model\.layers\.0\.mlp\.up_proj\.weight holds values {message}"):
        export(policy, tmp_path / "out.gguf", "gguf", dtype=dtype, show=False)
    weight[0, 0] = 1e5  # which both hold
    export(policy, tmp_path / "out.gguf", "gguf", dtype=dtype, show=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny("gemma2"), r"gemma2 is of the architecture gemma2; GGUF is written of llama, mistral, qwen"),
        (lambda: tiny("mistral"), r"mistral has a sliding window of 4 tokens, which is not written to GGUF"),
        (lambda: tiny("qwen2-window"), r"has a sliding window of 4 tokens"),
        (lambda: tiny(hidden_act="gelu"), r"has the activation gelu, which is not written to GGUF; expected silu"),
        (
            lambda: tiny(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            r"has rotary positions of type linear, which is not written to GGUF; expected default",
        ),
        (lambda: tiny(attention_bias=True), r"has model\.layers\.0\.self_attn\.q_proj\.bias, which a llama model"),
        (lambda: small_of(plain(), methods.rtn(bits=4, group=16)), r"q_proj has groups of 16 columns; .* --group 32"),
        (lambda: small_of(plain(intermediate_size=48), methods.rtn(bits=4, group=0)), r"down_proj has 48 input"),
        (lambda: small_of(plain(), methods.rtn(bits=5, group=32, zero="float")), r"in 5 bits with float zero points"),
        (lambda: small_of(plain(), methods.rtn(bits=8, group=32)), r"in 8 bits with zero points; expected --bits 7 or"),
        (lambda: small_of(plain(), methods.ptqtp(group=16)), r"'ternary', which no type of GGUF holds \(ptqtp\)"),
        (lambda: small_of(plain(), methods.smoothquant()), r"a step of kind 'dynamic' .* holds weights alone"),
        (lambda: small_of(tiny("mixtral")), r"mixtral rtn is of the architecture mixtral"),
        (with_own_groups, r"up_proj has groups that are no runs of columns"),
        (unscaled, r"up_proj has a smallest value beyond half precision"),
        (
            lambda: CausalPolicy(plain().model, make_tokenizer(), "tiny"),
            r"the tokenizer is a BPE tokenizer without merges; expected byte-level BPE with merges",
        ),
        (lambda: tiny(vocab_size=260), r"the tokenizer has 263 tokens and the model 260 rows for them"),
    ],
)  # fmt: skip
def test_what_the_format_does_not_hold(tmp_path: Path, make: Callable[[], CausalPolicy], message: str) -> None:
    with pytest.raises(PosttrainError, match=message) as raised:
        export(make(), tmp_path / "model.gguf", "gguf", show=False)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    assert "--dtype" in str(raised.value) or "_proj has" not in str(raised.value)


def test_values_in_the_place_of_codes(tmp_path: Path) -> None:
    """What GGUF does not hold as codes is written as what it stands for, where that is asked for."""
    small = small_of(plain(), methods.ptqtp(group=16))
    other = exported(small, tmp_path / "model.gguf", dtype="f32")
    torch.testing.assert_close(logits(other), logits(small), **CLOSE)


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    from posttrain.models.adapters import add_lora

    policy = add_lora(plain())
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters():
            parameter.add_(0.1 if "lora_B" in name else 0.0)
    other = exported(policy, tmp_path / "model.gguf")
    torch.testing.assert_close(logits(other), logits(policy), **CLOSE)
    assert (logits(plain()) - logits(policy)).abs().max() > 0.01


def test_no_room(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PosttrainError, match=r"cannot write the compressed model to .*: .*file is no folder"):
        export(plain(), tmp_path / "file" / "model.gguf", "gguf", show=False)
