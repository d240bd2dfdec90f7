"""The character tokenizer: a character a token, and what it reads it gives back."""

from __future__ import annotations

import string

import pytest
from transformers import AutoTokenizer

from posttrain.data.templates import render_prompt
from posttrain.lab.tokenizer import character_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


def test_every_printable_character_is_a_token_of_its_own(tokenizer):
    text = "".join(c for c in string.printable if c not in "\t\r\x0b\x0c")
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(set(ids)) == len(text) == 96
    assert len(tokenizer) == 100
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_four_and_leave_no_text(tokenizer):
    specials = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert specials == [0, 1, 2, 3]
    ids = [1, *tokenizer.encode("7 + 5\n12", add_special_tokens=False), 2, 0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "7 + 5\n12"


def test_other_characters_are_unknown(tokenizer):
    assert tokenizer.encode("é", add_special_tokens=False) == [3]


def test_a_prompt_starts_with_the_start_token(tokenizer):
    prompt = render_prompt(tokenizer, "46+57\n")
    assert prompt.tokens.tolist() == [1, *tokenizer.encode("46+57\n", add_special_tokens=False)]


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = 'a  b,~ "x"\n\n<9>'
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text), skip_special_tokens=True) == text
