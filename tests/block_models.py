"""Tiny models of many architectures, their blocks on a walk, and transforms applied to them as the pipeline does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.compress.calls import Batch
from posttrain.compress.experts import unfuse
from posttrain.compress.stacks import stacks
from posttrain.compress.transforms.transform import Transform
from posttrain.compress.walk import Block, Walk
from tiny_models import SHAPE, VOCABULARY, make_policy


def model_of(name: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """A model of `tiny_models`, or one of `bert`, `vit`, `gemma`, with its experts taken apart; all gains and biases
    differ from their usual constants.
    """
    if name in ("bert", "vit", "gemma"):
        return _other(name, seed)
    model = make_policy(name, None, seed, **overrides).model
    unfuse(model)
    return model.requires_grad_(False)


def _other(name: str, seed: int) -> nn.Module:
    import transformers as hf

    torch.manual_seed(seed)
    shape = {k: v for k, v in SHAPE.items() if k not in ("num_key_value_heads", "head_dim")}
    model: Any
    if name == "bert":
        model = hf.BertForMaskedLM(hf.BertConfig(**shape))
    elif name == "gemma":
        model = hf.GemmaForCausalLM(hf.GemmaConfig(**SHAPE))
    else:
        sizes = {"image_size": 12, "patch_size": 4, "num_channels": 1}
        model = hf.ViTForImageClassification(hf.ViTConfig(**{**shape, **sizes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def batches_of(model: nn.Module, rows: int = 3, length: int = 12, count: int = 2, seed: int = 0) -> list[Batch]:
    draw = torch.Generator().manual_seed(seed)
    if type(model).__name__.startswith("ViT"):
        return [{"pixel_values": torch.randn(rows, 1, 12, 12, generator=draw)} for _ in range(count)]
    tokens = [torch.randint(0, VOCABULARY, (rows, length), generator=draw) for _ in range(count)]
    return [{"input_ids": t} | ({} if "Bert" in type(model).__name__ else {"use_cache": False}) for t in tokens]


def blocks_of(model: nn.Module) -> list[Block]:
    return list(Walk(model, stacks(model)[0], batches_of(model)))


def first_block(name: str, **overrides: Any) -> Block:
    model = model_of(name, **overrides)
    return next(iter(Walk(model, stacks(model)[0], batches_of(model))))


def transform(model: nn.Module, transforms: Sequence[Transform]) -> None:
    """Apply transforms as the pipeline does, without compressing anything."""
    for each in transforms:
        each.apply_to_model(model)
    for block in Walk(model, stacks(model)[0], batches_of(model)):
        for each in transforms:
            each.apply_to_block(block)
            block.refresh()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """On tokens that nothing was calibrated on."""
    return model(**batches_of(model, count=1, seed=1)[0]).logits


def same(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())
