"""Tiny models and calibration for solvers that train: 64 tokens of vocabulary, 32 wide, in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from posttrain.compress.calls import Batch
from posttrain.compress.method import Compression
from posttrain.compress.packed.linear import PackedLinear
from posttrain.compress.pipeline import compress_model
from posttrain.compress.solvers.solver import Solver
from posttrain.compress.stacks import linears, stacks
from posttrain.compress.walk import Walk
from tiny_models import VOCABULARY, make_policy

GROUP = 16


def tiny(name: str = "llama", seed: int = 0, **overrides: Any) -> nn.Module:
    """A model of `tiny_models`, whose policy needs no tokenizer here."""
    return make_policy(name, None, seed, **overrides).model.requires_grad_(False)


def text(batches: int = 2, rows: int = 4, length: int = 12, seed: int = 0) -> list[Batch]:
    draw = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(0, VOCABULARY, (rows, length), generator=draw), "use_cache": False}
        for _ in range(batches)
    ]


def walk(model: nn.Module, batches: list[Batch] | None = None, **options: Any) -> Walk:
    return Walk(model, stacks(model)[0], batches or text(), keeps_float=True, **options)


def compressed(model: nn.Module, solver: Solver, batches: list[Batch] | None = None, **parts: Any) -> nn.Module:
    """The model, compressed in place."""
    compress_model(model, Compression("method", solver, **parts), batches or text())
    return model


def packed(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """What stands for every packed layer's weight."""
    return {name: layer.weight.dequantize() for name, layer in packed(model).items()}


def floats(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that a compression would pack."""
    found = {}
    for stack in stacks(model):
        for i, block in enumerate(stack.blocks):
            prefix = f"{stack.name}.{i}"
            found |= {f"{prefix}.{n}": layer.weight.detach().clone() for n, layer in linears(block, prefix).items()}
    return found


@torch.no_grad()
def logits(model: nn.Module, batches: list[Batch]) -> torch.Tensor:
    return torch.cat([model(**batch).logits for batch in batches])


def divergence(model: nn.Module, truth: torch.Tensor, batches: list[Batch]) -> float:
    """Mean KL, nats a token, from the true logits to the model's."""
    log_p, log_q = truth.log_softmax(-1), logits(model, batches).log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
