"""A tiny Llama as a GGUF file: 4-bit matrices, 8-bit embeddings, a byte-level tokenizer with a chat template."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from conftest import CHAT_TEMPLATE, make_tokenizer

WIDTH, INNER, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
MERGES = ["t h", "th e", "Ġ the"]


def vocabulary() -> list[str]:
    """The tokens of the shared tokenizer in the order of their ids, and three merged ones."""
    known = make_tokenizer().get_vocab()
    return [*sorted(known, key=lambda token: known[token]), *(m.replace(" ", "") for m in MERGES)]


def write_gguf(file: Path, seed: int = 0, without: str = "") -> dict[str, np.ndarray]:
    """Write the file, but for one tensor; returns the values of each after quantization, fp32, by GGUF name."""
    tokens = vocabulary()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *([1] * (len(tokens) - 3))])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(tokens), WIDTH), "output_norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (WIDTH,),
            f"blk.{i}.attn_q.weight": (WIDTH, WIDTH),
            f"blk.{i}.attn_k.weight": (WIDTH // 2, WIDTH),
            f"blk.{i}.attn_v.weight": (WIDTH // 2, WIDTH),
            f"blk.{i}.attn_output.weight": (WIDTH, WIDTH),
            f"blk.{i}.ffn_norm.weight": (WIDTH,),
            f"blk.{i}.ffn_gate.weight": (INNER, WIDTH),
            f"blk.{i}.ffn_up.weight": (INNER, WIDTH),
            f"blk.{i}.ffn_down.weight": (WIDTH, INNER),
        }
    shapes.pop(without, None)
    values = {}
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType.F32
        data = rng.normal(1.0 if len(shape) == 1 else 0.0, 0.2, shape).astype(np.float32)
        if len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q8_0 if "embd" in name else gguf.GGMLQuantizationType.Q4_1
            packed = gguf.quantize(data, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
            values[name] = gguf.dequantize(packed, kind)
        else:
            writer.add_tensor(name, data)
            values[name] = data
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values
