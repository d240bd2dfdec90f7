"""Where the blocks of a model are, and which linear layers in them are compressed."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from torch import nn

from posttrain.compress.packed.linear import TransformedLinear
from posttrain.trajectory import PosttrainError


@dataclass(frozen=True)
class Stack:
    """Blocks that run one after the other. name: where their list is in the model, as in `model.layers`."""

    name: str
    blocks: tuple[nn.Module, ...]


def stacks(model: nn.Module) -> list[Stack]:
    """The lists of blocks of a model, in the order of its modules: one of a language model, two of a model that sees.

    A stack is a list of modules of one class that hold linear layers and is not itself inside a block.
    """
    found: list[Stack] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{s.name}.") for s in found):
            continue
        if len({type(b) for b in module}) == 1 and any(isinstance(m, nn.Linear) for m in module.modules()):
            found.append(Stack(name, tuple(module)))
    if not found:
        raise PosttrainError(
            f"{type(model).__name__} has no list of blocks with linear layers; expected a transformers model such as "
            f"Llama, OPT, Mamba, BERT or ViT"
        )
    return found


def linears(block: nn.Module, prefix: str = "", skip: Sequence[str] = ()) -> dict[str, nn.Linear]:
    """The linear layers of a block by their names in it, but for those whose whole name matches a pattern of `skip`.

    prefix: the block's own name in the model. skip: shell patterns, as in `*.down_proj` or `model.layers.0.*`.
    """
    return {
        name: module
        for name, module in block.named_modules()
        if _multiplies(module) and not skipped(f"{prefix}.{name}" if prefix else name, skip)
    }


def _multiplies(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a linear layer and nothing more: a router that is one too (Llama 4's) gives other outputs."""
    return isinstance(module, nn.Linear) and type(module).forward in (nn.Linear.forward, TransformedLinear.forward)


def skipped(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(model: nn.Module, patterns: Sequence[str]) -> None:
    """PosttrainError for a pattern that no linear layer of the model matches: it would silently skip nothing."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise PosttrainError(
                f"skip pattern {pattern!r} matches no linear layer; names are such as {names[0] if names else 'none'}"
            )


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one of that dotted name."""
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent), last, module)


def whole_names(stack: Stack) -> Iterator[tuple[str, nn.Module]]:
    """Each block with its name in the model."""
    for index, block in enumerate(stack.blocks):
        yield f"{stack.name}.{index}", block
