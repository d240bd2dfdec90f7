"""Tokenizers in GGUF files: the same tokens once `transformers` has read them back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from exporting import MERGES, ROWS
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from conftest import make_tokenizer
from posttrain.compress.export.gguf_tokenizer import SPLITS, add_tokenizer
from posttrain.trajectory import PosttrainError

TEXTS = (
    "the theory of the 1234 things",
    "<|im_start|>user\nthe  end<|im_end|>\n",
    "Grüße, l'été 12\n\n  is\there",
    "<think>the</think>",
)


def written(tokenizer: Any, file: Path, rows: int = ROWS) -> Any:
    """The tokenizer read back from a file that holds it and nothing else."""
    from gguf import GGUFWriter
    from transformers import AutoTokenizer

    writer = GGUFWriter(file, "llama")
    add_tokenizer(writer, tokenizer, rows)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def split_by(tokenizer: Any, *steps: Any, normalizer: Any = None) -> Any:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


def by_regex(expression: str) -> tuple[Any, Any]:
    after = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Split(Regex(expression), behavior="isolated"), after


LLAMA3, QWEN2 = SPLITS


def test_the_same_tokens(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(MERGES)
    tokenizer.add_tokens(["<think>", "</think>"])
    again = written(tokenizer, tmp_path / "a.gguf")
    for text in TEXTS:
        assert again(text).input_ids == tokenizer(text).input_ids, text
        assert again.decode(again(text).input_ids) == text
    messages = [{"role": "user", "content": "the 12"}]
    told = {"tokenize": False, "add_generation_prompt": True}
    assert again.apply_chat_template(messages, **told) == tokenizer.apply_chat_template(messages, **told)
    assert (again.bos_token_id, again.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert len(tokenizer("the").input_ids) == 1


@pytest.mark.parametrize(
    ("expression", "name"), [(LLAMA3, "llama-bpe"), (QWEN2, "qwen2"), (PRETOKENIZE_REGEX, "qwen2")]
)
def test_splits_by_expression(tmp_path: Path, expression: str, name: str) -> None:
    tokenizer = split_by(make_tokenizer(MERGES), *by_regex(expression), normalizer=normalizers.NFC())
    again = written(tokenizer, tmp_path / "a.gguf")
    for text in TEXTS[:3]:
        assert again(text).input_ids == tokenizer(text).input_ids, text
    from gguf import GGUFReader

    assert GGUFReader(tmp_path / "a.gguf").fields["tokenizer.ggml.pre"].contents() == name
    plain = make_tokenizer(MERGES)
    assert again("1212").input_ids != plain("1212").input_ids, "the split is what makes the tokens differ"


def test_splits_by_digits(tmp_path: Path) -> None:
    from gguf import GGUFReader

    steps = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    written(split_by(make_tokenizer(MERGES), *steps), tmp_path / "a.gguf")
    assert GGUFReader(tmp_path / "a.gguf").fields["tokenizer.ggml.pre"].contents() == "smollm"


@pytest.mark.parametrize(
    "steps",
    [
        by_regex(r"\w+"),
        (pre_tokenizers.Whitespace(),),
        (pre_tokenizers.ByteLevel(add_prefix_space=True),),
        (pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)),
    ],
    ids=["expression", "whitespace", "space", "digits"],
)
def test_other_splits_have_no_name(tmp_path: Path, steps: Any) -> None:
    with pytest.raises(PosttrainError, match="in a way that has no name for GGUF here; expected the splits of GPT-2"):
        written(split_by(make_tokenizer(MERGES), *steps), tmp_path / "a.gguf")


def test_other_tokenizers(tmp_path: Path) -> None:
    words = Tokenizer(token_models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    with pytest.raises(PosttrainError, match="the tokenizer is a WordLevel tokenizer; expected byte-level BPE"):
        written(PreTrainedTokenizerFast(tokenizer_object=words), tmp_path / "a.gguf")
    with pytest.raises(PosttrainError, match="the tokenizer has 263 tokens and the model 200 rows for them"):
        written(make_tokenizer(MERGES), tmp_path / "a.gguf", rows=200)
