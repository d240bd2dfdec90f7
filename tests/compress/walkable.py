"""Tiny models of the architectures that the walk is tried on, each with ragged calibration batches of its kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from conftest import make_tokenizer
from posttrain.compress.calls import Batch
from tiny_models import SHAPE, VOCABULARY, make_policy

LANGUAGE = ("llama", "qwen2", "opt", "gpt-neox", "mixtral", "gemma3", "mamba")
WALKABLE = (*LANGUAGE, "bert", "vit")
_SIDE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.1,  # which must be off on the walk
    "initializer_range": 0.2,
}


def walkable(name: str, seed: int = 0) -> tuple[nn.Module, list[Batch]]:
    """A model in evaluation mode, and three batches: padded text, text without padding, images."""
    if name == "bert":
        from transformers import BertConfig, BertModel

        torch.manual_seed(seed)
        return BertModel(BertConfig(**_SIDE, vocab_size=VOCABULARY)).eval(), text(seed, padded=True)
    if name == "vit":
        from transformers import ViTConfig, ViTModel

        torch.manual_seed(seed)
        draw = torch.Generator().manual_seed(seed)
        images = [{"pixel_values": torch.randn(n, 3, 8, 8, generator=draw)} for n in (2, 1, 3)]
        return ViTModel(ViTConfig(**_SIDE, image_size=8, patch_size=4)).eval(), images
    return make_policy(name, make_tokenizer(), seed).model, text(seed, padded=name not in ("mamba",))


def text(seed: int = 0, *, padded: bool = False) -> list[Batch]:
    """Three batches of 2, 1 and 3 rows of 9, 12 and 7 tokens; padded ones are short by some at their ends."""
    draw = torch.Generator().manual_seed(seed)
    batches: list[Batch] = []
    for rows, length in ((2, 9), (1, 12), (3, 7)):
        tokens = torch.randint(0, SHAPE["vocab_size"], (rows, length), generator=draw)
        batch: Batch = {"input_ids": tokens}
        if padded:
            batch["attention_mask"] = (torch.arange(length) < length - torch.arange(rows)[:, None]).long()
        batches.append(batch)
    return batches
