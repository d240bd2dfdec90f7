"""What the tests of exported models share: tiny models, compressed in a moment, and what they compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from conftest import make_model, make_tokenizer
from posttrain import methods
from posttrain.compress.packed.linear import PackedLinear
from posttrain.compress.packed.weight import PackedWeight
from posttrain.compress.policy import CompressedPolicy, compressed_copy
from posttrain.models.causal import CausalPolicy
from tiny_models import make_policy

TOKENS = torch.arange(40)[None] * 7 % 250
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2")]
ROWS = 272  # of the embedding table: some more than there are tokens


def tiny(architecture: str = "llama", seed: int = 0, **config: Any) -> CausalPolicy:
    """A tiny model of an architecture in fp32, with a tokenizer that fits it."""
    return make_policy(architecture, make_tokenizer(MERGES), seed, **{"vocab_size": ROWS, **config})


def plain(**config: Any) -> CausalPolicy:
    return CausalPolicy(make_model(vocab_size=ROWS, **config), make_tokenizer(MERGES), "tiny")


def small_of(policy: CausalPolicy, method: Any = None, **options: Any) -> CompressedPolicy:
    batches = [{"input_ids": TOKENS, "use_cache": False}]
    return compressed_copy(policy, method or methods.rtn(bits=4, group=8), batches, **options)


def packed(policy: CausalPolicy) -> dict[str, PackedLinear]:
    return {n: m for n, m in policy.model.named_modules() if isinstance(m, PackedLinear)}


def with_weights(policy: CausalPolicy, **made: PackedWeight) -> CausalPolicy:
    """The policy with other weights in its first block, by the end of their layers' names (`up_proj=...`)."""
    for name, layer in packed(policy).items():
        last = name.rpartition(".")[2]
        if last in made and ".0." in name:
            layer.weight = made[last]
    return policy


def logits(model: Any) -> torch.Tensor:
    """`[1, length, vocabulary]` of a policy or a `transformers` model."""
    with torch.no_grad():
        return (model.model if isinstance(model, CausalPolicy) else model)(input_ids=TOKENS).logits.float()


def greedy(model: Any, count: int = 12) -> list[int]:
    """Tokens that a `transformers` model takes greedily after each of a few prompts."""
    found: list[int] = []
    for start in (3, 50, 120):
        prompt = torch.arange(start, start + 6)[None]
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False)
        found += out[0, 6:].tolist()
    return found


def bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if "token" not in file.name)
