"""One GGUF file, as llama.cpp reads it: configuration, tokenizer and tensors under its names.

Codes that GGUF's blocks of 32 columns can hold stay as they are stored (`gguf_blocks`); matrices that are float are
written in the shortest float type that holds them exactly, or as was asked; norms and biases in fp32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain.compress.export.floats import (
    LARGEST,
    check_exportable,
    check_finite,
    exact_dtype,
    float_tensors,
    input_steps,
    method_of,
    packed_layers,
    rounded,
    step_refused,
)
from posttrain.compress.export.gguf_blocks import BLOCK, Blocks, Unfit, blocks_of
from posttrain.compress.export.gguf_tokenizer import add_tokenizer
from posttrain.compress.export.integers import integers_of
from posttrain.compress.files import beside
from posttrain.compress.packed.weight import PackedWeight
from posttrain.models.causal import CausalPolicy
from posttrain.training.checkpoint import sync
from posttrain.trajectory import PosttrainError

if TYPE_CHECKING:
    from gguf import GGUFWriter

PROGRAM = "GGUF"
KINDS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}  # of --dtype
ROUNDED = {"F16": torch.float16, "BF16": torch.bfloat16}  # what may be beyond them is told
EXACT = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Architecture:
    """name: llama.cpp's. turned: whether its rotary positions turn neighbouring channels of queries and keys together,
    where those of `transformers` turn channels that lie half a head apart, so that their rows are stored in another
    order. biases: the layers that have one.
    """

    name: str
    turned: bool = False
    biases: tuple[str, ...] = ()


ARCHITECTURES = {
    "llama": Architecture("llama", turned=True),
    "mistral": Architecture("llama", turned=True),
    "qwen2": Architecture("qwen2", biases=("q_proj", "k_proj", "v_proj")),
    "qwen3": Architecture("qwen3"),
}


def write(policy: CausalPolicy, file: Path, dtype: str | None, progress: Callable[[int, int], None]) -> dict[str, int]:
    """Write a new file; returns how many matrices are stored in which type.

    dtype: a key of KINDS, for matrices that are float and for those whose codes GGUF does not hold; None stores the
    former exactly, and the latter are an error. progress: of tensors.
    Raises PosttrainError for an architecture, tokenizer or layer that cannot be written.
    """
    import gguf

    model: Any = policy.base
    architecture = _architecture(policy)
    check_exportable(policy, PROGRAM)
    floats, layers = float_tensors(policy), packed_layers(policy)
    _check_biases(floats, architecture, policy)
    writer = gguf.GGUFWriter(None, architecture.name)
    tensors = _Tensors(writer, policy, architecture, dtype)
    _describe(writer, model.config, policy.name)
    add_tokenizer(writer, policy.tokenizer, len(model.get_input_embeddings().weight))
    total = len(floats) + len(layers)
    for count, (name, layer) in enumerate(layers.items()):
        if steps := input_steps(layer):
            raise step_refused(name, steps[0], policy, f"{PROGRAM} holds weights alone; quantize without activations")
        tensors.add_packed(f"{name}.weight", layer.weight)
        progress(count + 1, total)
    for count, (name, tensor) in enumerate(floats.items(), len(layers)):
        tensors.add_float(name, tensor)
        progress(count + 1, total)
    writer.add_file_type(_file_type(tensors.stored))
    target = file.resolve()
    with beside(target, file) as scratch:
        _save(writer, scratch / target.name)
        (scratch / target.name).rename(target)
        sync(target.parent)
    return dict(tensors.stored)


def _save(writer: GGUFWriter, file: Path) -> None:
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    sync(file)


def _file_type(stored: Counter[str]) -> int:
    """llama.cpp's number for what most matrices are stored as."""
    from gguf import LlamaFileType

    most = stored.most_common(1)[0][0]
    return int(LlamaFileType.ALL_F32 if most == "F32" else LlamaFileType[f"MOSTLY_{most}"])


# -- what fits ---------------------------------------------------------------------------------------------------------


def _architecture(policy: CausalPolicy) -> Architecture:
    """llama.cpp's architecture; PosttrainError for one that is not written here, or with parts that it has not."""
    config: Any = policy.base.config
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise PosttrainError(
            f"{policy.name} is of the architecture {config.model_type}; {PROGRAM} is written of "
            f"{', '.join(ARCHITECTURES)}"
        )
    rope = config.rope_parameters
    rotary, share = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    window = getattr(config, "sliding_window", None)
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    for given, expected, wrong in (
        (f"rotary positions of type {rotary}", "default", rotary != "default"),
        (f"rotary positions on {share:.0%} of a head", "all of it", share != 1),
        (f"a sliding window of {window} tokens", "none", window is not None and windowed),
        (f"the activation {config.hidden_act}", "silu", config.hidden_act != "silu"),
    ):
        if wrong:
            raise PosttrainError(f"{policy.name} has {given}, which is not written to {PROGRAM}; expected {expected}")
    return found


def _check_biases(floats: dict[str, Tensor], architecture: Architecture, policy: CausalPolicy) -> None:
    for name in floats:
        layer, _, last = name.rpartition(".")
        if last == "bias" and layer.rpartition(".")[2] not in architecture.biases:
            raise PosttrainError(
                f"{policy.name} has {name}, which a {architecture.name} model of {PROGRAM} has not; expected biases on "
                f"{', '.join(architecture.biases) or 'no layer'}"
            )


def _describe(writer: GGUFWriter, config: Any, name: str) -> None:
    import gguf

    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_type(gguf.GGUFType.MODEL)
    # transformers takes a file whose name is "mistral" for an architecture that it then has no tensor names for
    writer.add_name(Path(name).name.replace("mistral", "Mistral"))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(width)
    writer.add_vocab_size(config.vocab_size)


# -- tensors -----------------------------------------------------------------------------------------------------------


class _Tensors:
    """Adds a model's tensors under llama.cpp's names. stored: matrices by type."""

    def __init__(self, writer: GGUFWriter, policy: CausalPolicy, architecture: Architecture, dtype: str | None) -> None:
        import gguf

        config: Any = policy.base.config
        self.writer, self.policy, self.config, self.dtype = writer, policy, config, dtype
        self.turned = architecture.turned
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
        self.names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
        self.stored: Counter[str] = Counter()

    def add_packed(self, name: str, weight: PackedWeight) -> None:
        """Codes as they are stored; where GGUF does not hold them, their values in the type that was asked for."""
        try:
            found = integers_of(weight)
            if found is None:
                raise Unfit(f"is stored in the format {weight.format!r}, which no type of {PROGRAM} holds")
            made = blocks_of(found, self._rows(name, weight.shape[0]))
        except Unfit as reason:
            if self.dtype is None:
                raise PosttrainError(
                    f"{name.removesuffix('.weight')} {reason} ({method_of(self.policy)}); or give --dtype f16 or q8_0 "
                    f"to store the values of such layers instead of their codes"
                ) from None
            self.add_float(name, weight.dequantize().cpu())
            return
        self._add(name, made)

    def add_float(self, name: str, tensor: Tensor) -> None:
        rows = self._rows(name, tensor.shape[0])
        values = tensor.float() if rows is None else tensor.float()[rows]
        if values.ndim < 2:
            self._add(name, self._made(name, values, "F32"), counted=False)
            return
        kind = EXACT[exact_dtype([values])] if self.dtype is None else KINDS[self.dtype]
        if kind == "Q8_0" and values.shape[1] % BLOCK:
            kind = "F16"  # as llama.cpp does with columns that blocks do not divide
        self._add(name, self._made(name, values, kind))

    def _made(self, name: str, values: Tensor, kind: str) -> Blocks:
        import gguf

        check_finite(name, values)
        if kind in ROUNDED:
            values = rounded(name, values, ROUNDED[kind]).to(values.dtype)
        if kind == "Q8_0" and values.numel() and float(values.abs().amax()) / 127 > LARGEST:
            raise PosttrainError(
                f"{name} holds values whose scales are beyond half precision (65504); expected --dtype bf16 or f32"
            )
        return Blocks(kind, gguf.quantize(values.contiguous().numpy(), gguf.GGMLQuantizationType[kind]))

    def _add(self, name: str, made: Blocks, *, counted: bool = True) -> None:
        import gguf

        known = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise PosttrainError(
                f"{self.policy.name} has {name}, for which {PROGRAM} has no name; expected the tensors of a plain "
                f"{self.config.model_type} model"
            )
        self.writer.add_tensor(known, made.data, raw_dtype=gguf.GGMLQuantizationType[made.kind])
        if counted:
            self.stored[made.kind] += 1

    def _rows(self, name: str, rows: int) -> Tensor | None:
        """The row that stands at each place: llama.cpp has the two halves of a head's rows in turns."""
        layer = name.rpartition(".")[0].rpartition(".")[2]
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}.get(layer)
        if not self.turned or heads is None:
            return None
        return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()
