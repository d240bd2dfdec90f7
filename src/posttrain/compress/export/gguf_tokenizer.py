"""A byte-level BPE tokenizer as llama.cpp reads it from a GGUF file: the tokens, their kinds, the merges, how text is
split before them, special tokens and the chat template.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.trajectory import PosttrainError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's names for the expressions that text is split by before tokens are merged
SPLITS = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}


def add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Add a tokenizer to a file. rows: of the embedding table; places without a token are filled up.

    Raises PosttrainError for a tokenizer that is no byte-level BPE, one that splits text in a way for which llama.cpp
    has no name here, and one with more tokens than the model has rows.
    """
    from gguf import SpecialVocab

    described = _described(tokenizer)
    split = _split(described)
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(tokens) >= rows:
        raise PosttrainError(
            f"the tokenizer has {max(tokens) + 1} tokens and the model {rows} rows for them; GGUF wants a row each"
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in range(rows)])
    writer.add_token_types(_kinds(tokenizer, tokens, rows))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        special = SpecialVocab(Path(folder), load_merges=True, n_vocab=rows)
    special.add_to_gguf(writer, quiet=True)
    if "bos" not in special.add_special_token:
        writer.add_add_bos_token(False)


def _described(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The `tokenizer.json` of a byte-level BPE tokenizer with merges."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    found: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    model = found.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback") or not model.get("merges"):
        kind = f"a {model.get('type')}" if model.get("type") else "a Python"
        raise PosttrainError(
            f"the tokenizer is {kind} tokenizer{' without merges' if model.get('type') == 'BPE' else ''}; expected "
            f"byte-level BPE with merges (as of Llama 3, Qwen or SmolLM), which alone is written to GGUF"
        )
    return found


def _split(described: dict[str, Any]) -> str:
    """llama.cpp's name for how text is split before tokens are merged."""
    normalizer, pre = described.get("normalizer"), described.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    kinds = [step.get("type") for step in steps]
    plain = normalizer is None or normalizer.get("type") == "NFC"
    if plain and kinds and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        by_words = bool(steps[-1].get("use_regex", True))
        if kinds == ["ByteLevel"] and by_words:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and by_words and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not by_words:
            name = SPLITS.get((steps[0].get("pattern") or {}).get("Regex", ""))
            if name is not None:
                return name
    raise PosttrainError(
        f"the tokenizer splits text by {' and '.join(str(k) for k in kinds)} in a way that has no name for GGUF here; "
        f"expected the splits of GPT-2, SmolLM, Llama 3 or Qwen 2"
    )


def _kinds(tokenizer: PreTrainedTokenizerBase, tokens: dict[int, str], rows: int) -> list[int]:
    """The kind of each token: normal, control (special), user-defined (added), or unused."""
    from gguf import TokenType

    added = tokenizer.added_tokens_decoder
    kinds = []
    for number in range(rows):
        if number not in tokens:
            kinds.append(TokenType.UNUSED)
        elif number in added:
            kinds.append(TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED)
        else:
            kinds.append(TokenType.NORMAL)
    return [int(kind) for kind in kinds]
