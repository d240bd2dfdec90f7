"""Calls of a model's blocks: what each is given, which of its layers they reach, what its parts gave before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.compress.experts import holder
from posttrain.compress.stacks import Stack, linears, stacks, whole_names
from posttrain.trajectory import PosttrainError

Batch = dict[str, Any]  # the keyword arguments of one forward pass of the model
PROBE = 8  # tokens that show how a language model calls its blocks and layers


@dataclass(slots=True)
class Call:
    """One call of a block: its hidden states `[rows, tokens, width]`, and what else it is given (masks, positions)."""

    hidden: Tensor
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)

    def of(self, hidden: Tensor) -> Call:
        """The same call with other hidden states."""
        return Call(hidden, self.arguments, self.keywords)


def run(module: nn.Module, call: Call) -> Tensor:
    """A block's output hidden states."""
    out = module(call.hidden, *call.arguments, **call.keywords)
    return out[0] if isinstance(out, tuple) else out


@contextmanager
def forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, the module computes what this function does; outside, what it did before."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


class Recalled:
    """What a part of a block gave, input by input of the block: it is computed once."""

    def __init__(self, part: nn.Module) -> None:
        self.part = part
        self._kept: dict[int, tuple[Any, list[int]]] = {}

    @contextmanager
    def at(self, index: int, keep: bool) -> Iterator[None]:
        """While the block runs on its input of that number. keep: what the part gives for the first time."""
        forward = self.part.forward

        def recall(*arguments: Any, **keywords: Any) -> Any:
            if index in self._kept:
                found, versions = self._kept[index]
                if _versions(found) == versions:  # else it was changed in place by what came after
                    return found
            found = forward(*arguments, **keywords)
            if keep:
                self._kept[index] = found, _versions(found)
            return found

        with forward_of(self.part, recall):
            yield


def _versions(found: Any) -> list[int]:
    """How often each tensor was written to."""
    values = found if isinstance(found, tuple | list) else (found,)
    return [-1 if v.is_inference() else v._version for v in values if isinstance(v, Tensor)]


class Ended(Exception):
    """Ends a forward pass of which no more is wanted."""


@torch.no_grad()
def captured(model: nn.Module, stack: Stack, batches: Sequence[Batch]) -> list[list[Call]]:
    """`[block][batch]` the calls of every block, with the hidden states of the first and empty ones for the others.

    Blocks are not computed where it makes no difference to what else they are given: they hand their hidden states on.
    """
    if not batches:
        return [[] for _ in stack.blocks]
    with _deterministic(model):
        short = _probe(batches[0])
        plain, forms = _watched(model, stack, [short], None)
        handed = None not in forms[:-1] and _alike(plain, _watched(model, stack, [short], forms)[0])
        return _watched(model, stack, batches, forms if handed else None)[0]


Form = int | None  # of a block's output: 0 for hidden states, n for n values, all None but those; else None


def _watched(
    model: nn.Module, stack: Stack, batches: Sequence[Batch], handing: Sequence[Form] | None
) -> tuple[list[list[Call]], list[Form]]:
    """The calls of blocks that compute, or that hand their hidden states on in these forms; and the forms."""
    from transformers.cache_utils import Cache

    calls: list[list[Call]] = [[] for _ in stack.blocks]
    forms: list[Form] = [0 for _ in stack.blocks]

    def watch(index: int) -> Callable[..., None]:
        def seen(module: nn.Module, given: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            # a cache that a call fills would be there, full, in the next one
            keywords = {k: v for k, v in keywords.items() if k != "use_cache" and not isinstance(v, Cache)}
            first, *rest = given or (keywords.pop("hidden_states"),)
            rest = [None if isinstance(v, Cache) else v for v in rest]
            calls[index].append(Call(first if index == 0 else first[:0], tuple(rest), keywords))
            if index == len(calls) - 1:
                raise Ended

        return seen

    def look(index: int) -> Callable[..., None]:
        def gave(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            forms[index] = _form(output)

        return gave

    hooks = [b.register_forward_pre_hook(watch(i), with_kwargs=True) for i, b in enumerate(stack.blocks)]
    hooks += [b.register_forward_hook(look(i)) for i, b in enumerate(stack.blocks)]
    try:
        with ExitStack() as replaced:
            for block, form in zip(stack.blocks, handing or (), strict=handing is not None):
                replaced.enter_context(forward_of(block, partial(_hand_on, form)))
            for batch in batches:
                with suppress(Ended):
                    model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    if any(len(found) != len(batches) for found in calls):
        raise PosttrainError(f"not every block of {stack.name} was called once a batch; its blocks cannot be walked")
    return calls, forms


def _form(output: Any) -> Form:
    if isinstance(output, Tensor):
        return 0
    plain = isinstance(output, tuple) and isinstance(output[0], Tensor) and all(v is None for v in output[1:])
    return len(output) if plain else None


def _hand_on(form: Form, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
    return (hidden_states, *[None] * (form - 1)) if form else hidden_states


def _alike(one: Any, other: Any) -> bool:
    """Whether calls are the same but for the numbers of hidden states."""
    if isinstance(one, Call) and isinstance(other, Call):
        return one.hidden.shape == other.hidden.shape and _alike(
            (one.arguments, one.keywords), (other.arguments, other.keywords)
        )
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_alike(one[k], other[k]) for k in one)
    return one is other or (isinstance(one, bool | int | float | str) and one == other)


@torch.no_grad()
def uncalled(model: nn.Module, batches: Sequence[Batch]) -> list[str]:
    """Linear layers of a model's blocks, by their whole names, that its forward pass does not call.

    Such a layer cannot be compressed as the others: what its inputs are is not seen, and what is put before it would
    not be run. Mamba's dt_proj is one, whose mixer multiplies by the weight itself. Experts to which no token was sent
    do not count (see `experts.shown_all`). Seen on a few tokens of the first batch, on all of it where it is no text.
    """
    blocks = dict(named for stack in stacks(model) for named in whole_names(stack))
    layers = {
        f"{place}.{name}": layer
        for place, block in blocks.items()
        for name, layer in linears(block).items()
        if holder(block, name) is None
    }
    called: set[str] = set()
    left = set(blocks)

    def watch(name: str) -> Callable[..., None]:
        return lambda module, given: called.add(name)

    def done(name: str) -> Callable[..., None]:
        def ran(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            left.discard(name)
            if not left:
                raise Ended

        return ran

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    hooks += [block.register_forward_hook(done(name)) for name, block in blocks.items()]
    try:
        with _deterministic(model), suppress(Ended):
            for batch in batches[:1]:
                model(**_probe(batch))
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name in layers if name not in called] if batches else []


def _probe(batch: Batch) -> Batch:
    """A few tokens of a batch that is text alone, else the batch."""
    if not set(batch) <= {"input_ids", "attention_mask", "use_cache"} or "input_ids" not in batch:
        return batch
    return {**batch, "input_ids": batch["input_ids"][:1, :PROBE], "attention_mask": None}


@contextmanager
def _deterministic(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
