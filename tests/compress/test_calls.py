"""Blocks are computed no more often than it takes, and nothing that follows is changed by that."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from walkable import WALKABLE, walkable

from posttrain import methods
from posttrain.compress.calls import PROBE, Recalled, _alike, _watched, captured
from posttrain.compress.packed.linear import PackedLinear
from posttrain.compress.pipeline import compress_model
from posttrain.compress.stacks import Stack, linears, stacks
from posttrain.compress.walk import Block


class Tokens:
    """How many tokens a linear layer was given."""

    def __init__(self, layer: nn.Module) -> None:
        self.count = 0
        layer.register_forward_pre_hook(self.seen)

    def seen(self, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        self.count += given[0].numel() // given[0].shape[-1]


@pytest.mark.parametrize("name", WALKABLE)
def test_calls_are_those_of_the_models_own_pass(name: str) -> None:
    model, batches = walkable(name)
    (stack,) = stacks(model)
    with torch.no_grad():
        wanted, _ = _watched(model, stack, batches, None)
    found = captured(model, stack, batches)
    assert _alike(found, wanted)
    for one, other in zip(found[0], wanted[0], strict=True):
        assert torch.equal(one.hidden, other.hidden)


@pytest.mark.parametrize("name", ["llama", "gemma3", "bert"])
def test_blocks_are_not_computed_for_it(name: str) -> None:
    model, batches = walkable(name)
    (stack,) = stacks(model)
    first = Tokens(next(iter(linears(stack.blocks[0]).values())))
    captured(model, stack, batches)
    assert first.count == min(PROBE, batches[0]["input_ids"].shape[1])


class Asks(nn.Module):
    """A block that is told how large the stream was before the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, hidden: Tensor, size: Tensor) -> Tensor:
        return self.layer(hidden) * size


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Asks(), Asks(), Asks()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, x.norm())
        return x


def test_blocks_whose_arguments_come_from_others_are_computed() -> None:
    torch.manual_seed(0)
    model, batches = Model(), [{"x": torch.randn(2, 3, 4)}, {"x": torch.randn(1, 3, 4)}]
    stack = Stack("blocks", list(model.blocks))
    with torch.no_grad():
        wanted, _ = _watched(model, stack, batches, None)
        handed, _ = _watched(model, stack, batches, [0, 0, 0])
    assert _alike(captured(model, stack, batches), wanted)
    assert not _alike(handed, wanted)


@pytest.mark.parametrize("name", WALKABLE)
def test_solved_layers_are_the_same_to_the_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every block computed whole for every stage, and nothing remembered."""

    def solved() -> tuple[dict[str, Tensor], int]:
        model, batches = walkable(name)
        layers = [layer for block in stacks(model)[0].blocks for layer in linears(block).values()]
        counts = [Tokens(layer) for layer in layers]
        compress_model(model, methods.gptq(3, 0), batches)
        packed = {n: m.weight.dequantize() for n, m in model.named_modules() if isinstance(m, PackedLinear)}
        return packed, sum(c.count for c in counts)

    quick, computed = solved()
    monkeypatch.setattr(Block, "settle", lambda self: None)
    monkeypatch.setattr(Block, "_until", lambda self, names: nullcontext())
    whole, before = solved()
    assert quick.keys() == whole.keys()
    assert all(torch.equal(quick[n], whole[n]) for n in whole)
    assert computed < before


def test_a_part_is_computed_once_unless_its_output_was_written_to() -> None:
    part, calls = nn.Linear(3, 3), Tokens(layer := nn.Linear(3, 3))
    part.forward = layer.__call__  # type: ignore[method-assign]
    recalled, x = Recalled(part), torch.ones(1, 3)

    def ask(index: int, keep: bool = True) -> Tensor:
        with recalled.at(index, keep), torch.no_grad():
            found: Tensor = part(x)
            return found

    first: Any = ask(0)
    assert ask(0) is first
    assert calls.count == 1
    ask(1, keep=False)
    ask(1, keep=False)
    assert calls.count == 3
    first.add_(1.0)
    torch.testing.assert_close(ask(0), first - 1.0)
    assert calls.count == 4
