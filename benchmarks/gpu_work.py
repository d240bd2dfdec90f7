"""The work of `benchmarks.gpu`: a model made from a configuration, a tokenizer made in code, rows made by seed.

Nothing is downloaded. Weights are random, which no time depends on; a word of the text is a token, so that the lengths
of rows are what they are drawn to be.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Row = dict[str, Any]
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>", "user", "assistant")
TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Words of prompts or completions: a normal distribution, cut off at both ends."""

    mean: int
    deviation: int
    least: int
    most: int

    def draw(self, generator: random.Random) -> int:
        return min(self.most, max(self.least, round(generator.gauss(self.mean, self.deviation))))


@dataclass(frozen=True, slots=True)
class Load:
    """What is measured at a size of the model.

    model: the configuration's arguments. rows: of an SFT step; pairs: of a DPO step; prompts, group, tokens: of a GRPO
    step and of generation. prompt, answer: how long rows are. budget: tokens that ours computes at a time; pieces:
    micro-batches that TRL cuts a GRPO step into. matrices: sides of the square matrices of the kernels; square: side of
    the products that give the roofline.
    """

    model: dict[str, Any]
    rows: int = 32
    pairs: int = 16
    prompts: int = 16
    group: int = 16
    tokens: int = 256
    prompt: Lengths = Lengths(110, 35, 30, 240)
    answer: Lengths = Lengths(115, 45, 20, 280)
    budget: int = 8192
    pieces: int = 8
    matrices: tuple[int, ...] = (4096, 8192)
    square: int = 8192
    loads: tuple[tuple[int, int], ...] = ((16, 16), (16, 1))  # prompts and samples of generation


# the shape of Qwen2.5-1.5B
BIG = Load(
    {
        "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "tie_word_embeddings": True, "rope_theta": 1e6,
    }
)  # fmt: skip
TINY = Load(
    {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    },
    rows=8, pairs=4, prompts=4, group=4, tokens=16, prompt=Lengths(12, 4, 4, 20), answer=Lengths(12, 4, 4, 20),
    budget=256, pieces=2, matrices=(256,), square=256, loads=((4, 4), (2, 1)),
)  # fmt: skip
SIZES: dict[str, Load] = {"1.5b": BIG, "tiny": TINY}


@dataclass(slots=True)
class Work:
    """A load on a device. steps: of which rows were made so far, so that no two measurements are of other rows."""

    load: Load
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    tokenizer: Any = field(init=False)

    def __post_init__(self) -> None:
        self.tokenizer = make_tokenizer(self.load.model["vocab_size"])

    def model(self) -> Any:
        """The same random weights each time, made on the device."""
        from transformers import Qwen2Config, Qwen2ForCausalLM

        ends: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        config = Qwen2Config(**self.load.model, **ends, attention_dropout=0.0)
        config._attn_implementation = "sdpa"
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                made: Any = Qwen2ForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        made.generation_config.eos_token_id = 2
        made.generation_config.pad_token_id = 0
        return made.eval()

    def rows(self, kind: Literal["sft", "dpo", "grpo"], count: int) -> list[Row]:
        """Conversations, as both sides read them."""
        draw = random.Random(0)
        return [_row(kind, draw, self.load) for _ in range(count)]

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Token ids of prompts for generation."""
        draw = random.Random(1)
        return [
            [draw.randrange(len(SPECIAL), self.load.model["vocab_size"]) for _ in range(length)] for _ in range(count)
        ]


def make_tokenizer(vocabulary: int) -> Any:
    """A word is a token: `w7`, `w8`, ... and five special ones; text is split at spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), vocabulary))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|pad|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|pad|>",
        unk_token="<|pad|>", clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def reward(completion: str) -> float:
    """A number that follows from the text, so that the completions of a prompt differ in it."""
    return zlib.crc32(completion.encode()) % 1000 / 1000


def _row(kind: str, draw: random.Random, load: Load) -> Row:
    def text(lengths: Lengths) -> str:
        count = lengths.draw(draw)
        return " ".join(f"w{draw.randrange(len(SPECIAL), load.model['vocab_size'])}" for _ in range(count))

    prompt = [{"role": "user", "content": text(load.prompt)}]
    if kind == "grpo":
        return {"prompt": prompt}
    names = ("completion",) if kind == "sft" else ("chosen", "rejected")
    return {"prompt": prompt, **{name: [{"role": "assistant", "content": text(load.answer)}] for name in names}}
