"""How much the language model's loss minds: squared gradients of weights, and of blocks' outputs.

The diagonal of the empirical Fisher information, as SqueezeLLM (2023, arXiv 2306.07629) and BRECQ take it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.compress.calls import Batch
from posttrain.compress.stacks import Stack
from posttrain.models.causal import CausalPolicy
from posttrain.objective.logprob import token_statistics
from posttrain.trajectory import PosttrainError


def next_token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """`[rows]`: of each sequence of `input_ids`, the mean of -log p(next token), nats; logits are never kept."""
    ids = batch.get("input_ids")
    if ids is None:
        raise PosttrainError(
            f"calibration has {', '.join(sorted(batch))}; a loss of the next token needs input_ids: calibrate on text"
        )
    policy = CausalPolicy(model, None)  # type: ignore[arg-type]
    hidden = policy.body(**batch).last_hidden_state[:, :-1]
    logp = token_statistics(hidden.flatten(0, 1), ids[:, 1:].flatten(), policy.head()).logp
    return -logp.view(len(ids), -1).mean(1)


def weight_fisher(model: nn.Module, layers: dict[str, nn.Linear], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """By name, `[out, in]` fp32: the squared gradient of each sequence's loss, summed over the sequences."""
    found = {name: torch.zeros(layer.weight.shape) for name, layer in layers.items()}
    weights = [layer.weight for layer in layers.values()]
    with learning(model, weights):
        for row in rows_of(batches, 1):  # gradients are squared before they are added
            next_token_losses(model, row).sum().backward()
            for name, layer in layers.items():
                if layer.weight.grad is not None:  # an expert that no token was sent to has none
                    found[name].addcmul_(layer.weight.grad.float(), layer.weight.grad.float())
                    layer.weight.grad = None
    return found


def output_fisher(model: nn.Module, stack: Stack, batches: Sequence[Batch]) -> list[list[Tensor]]:
    """`[block][batch]`: the squared gradient of each sequence's loss by the block's outputs, in their shape, bf16."""
    found: list[list[Tensor]] = [[] for _ in stack.blocks]
    outputs: list[Tensor] = []

    def begin(module: nn.Module, given: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if given:
            return (given[0].detach().requires_grad_(True), *given[1:]), keywords
        return given, {**keywords, "hidden_states": keywords["hidden_states"].detach().requires_grad_(True)}

    def end(module: nn.Module, given: tuple[Any, ...], out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        hidden.retain_grad()
        outputs.append(hidden)

    hooks = [stack.blocks[0].register_forward_pre_hook(begin, with_kwargs=True)]
    hooks += [block.register_forward_hook(end) for block in stack.blocks]
    try:
        with learning(model, []):
            for batch in batches:
                outputs.clear()
                next_token_losses(model, batch).sum().backward()
                for block, hidden in enumerate(outputs):
                    assert hidden.grad is not None
                    found[block].append((hidden.grad.float() ** 2).bfloat16())
    finally:
        for hook in hooks:
            hook.remove()
    return found


def rows_of(batches: Sequence[Batch], rows: int) -> Iterator[Batch]:
    """The batches in parts of at most that many sequences."""
    for batch in batches:
        count = len(batch["input_ids"]) if "input_ids" in batch else 1
        for start in range(0, count, rows):
            yield {
                k: v[start : start + rows] if isinstance(v, Tensor) and v.ndim > 1 and len(v) == count else v
                for k, v in batch.items()
            }


@contextmanager
def learning(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """Gradients of these weights alone."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in before:
            parameter.grad = None
            parameter.requires_grad_(flag)
