"""How much a model's answer depends on each of its layers: by correlation, by pruning, by the slope of the loss."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from posttrain.compress.calls import Batch
from posttrain.compress.stacks import Stack, linears, whole_names
from posttrain.trajectory import PosttrainError

Unit = Literal["block", "linear"]
Form = Literal["difference", "gradient"]
Target = Literal["input", "next", "final"]


@dataclass(frozen=True)
class Layer:
    """What gets bits together: a block with all its linear layers, or one of these. modules: by their whole names."""

    name: str
    block: nn.Module
    modules: dict[str, nn.Linear]

    @property
    def perturbed(self) -> nn.Module:
        """What its input is the input of: the linear layer where it is one, else the block."""
        return self.modules.get(self.name, self.block)

    @property
    def weights(self) -> int:
        return sum(m.weight.numel() for m in self.modules.values())


def layers(stacks: Sequence[Stack], skip: Sequence[str], unit: Unit = "block") -> list[Layer]:
    """The layers of a model, without what is skipped."""
    found = []
    for stack in stacks:
        for name, block in whole_names(stack):
            inside = {f"{name}.{n}": m for n, m in linears(block, name, skip).items()}
            parts = [(name, inside)] if unit == "block" else [(n, {n: m}) for n, m in inside.items()]
            found += [Layer(part, block, modules) for part, modules in parts if modules]
    return found


@dataclass(frozen=True)
class Score(ABC):
    """Says how sensitive a model is to each of its layers, from the float model and calibration batches.

    tokens: how many it looks at, at most: whole sequences, the first ones.
    """

    tokens: int = 2048

    @property
    def unit(self) -> Unit:
        return "block"

    @abstractmethod
    def sensitivity(self, model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch]) -> dict[str, float]:
        """By a layer's name, a number that is larger the more the model depends on it."""


@dataclass(frozen=True)
class Correlation(Score):
    r"""CMPQ: one less the mean canonical correlation of what a block is given and what it adds.

    target: what a block's input is correlated with: what the block itself adds to it (`input`), or what it adds is
    correlated with what the next block adds (`next`) or with the last block's output (`final`). width: dimensions that
    both are projected to, where they have more. A residual stream correlates with itself, so it is the addition that is
    looked at, not the sum.
    """

    tokens: int = 4096
    target: Target = "input"
    width: int = 64
    seed: int = 0

    def sensitivity(self, model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch]) -> dict[str, float]:
        given: list[list[Tensor]] = [[] for _ in layers]
        added: list[list[Tensor]] = [[] for _ in layers]
        last: list[Tensor] = []

        def watch(number: int) -> Callable[..., None]:
            def seen(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], out: Any) -> None:
                before, after = _hidden(args, keywords), out[0] if isinstance(out, tuple) else out
                if before.shape != after.shape:
                    raise PosttrainError(
                        f"{layers[number].name} changes the shape of its input; no canonical correlation"
                    )
                given[number].append(self._projected(before))
                added[number].append(self._projected(after - before))
                if number == len(layers) - 1:
                    last.append(self._projected(after))

            return seen

        with ExitStack() as hooks, torch.no_grad():
            for number, layer in enumerate(layers):
                hooks.callback(layer.block.register_forward_hook(watch(number), with_kwargs=True).remove)
            for batch in first_tokens(batches, self.tokens):
                model(**batch)
        xs, ys = [torch.cat(x) for x in given], [torch.cat(y) for y in added]
        final = torch.cat(last)
        pairs = {
            "input": list(zip(xs, ys, strict=True)),
            "next": [*pairwise(ys), (ys[-1], final)],
            "final": [(y, final) for y in ys],
        }[self.target]
        return {
            layer.name: 1 - float(canonical_correlations(x, y).mean())
            for layer, (x, y) in zip(layers, pairs, strict=True)
        }

    def _projected(self, hidden: Tensor) -> Tensor:
        """`[tokens, at most width]` fp64, by the same random directions every time."""
        flat = hidden.detach().reshape(-1, hidden.shape[-1]).double().cpu()
        if flat.shape[1] <= self.width:
            return flat
        draw = torch.Generator().manual_seed(self.seed)
        return flat @ torch.randn(flat.shape[1], self.width, generator=draw, dtype=torch.float64)


def canonical_correlations(x: Tensor, y: Tensor, ridge: float = 1e-9) -> Tensor:
    """`[min(p, q)]` of `[n, p]` and `[n, q]` samples: singular values of Cxx^(-1/2) Cxy Cyy^(-1/2), both centred.

    ridge: times the mean variance, added to both. PosttrainError for fewer samples than four times the dimensions, of
    which correlations would come out as 1 whatever they are.
    """
    width = max(x.shape[1], y.shape[1])
    if len(x) < 4 * width:
        raise PosttrainError(
            f"canonical correlations of {width} dimensions need {4 * width} tokens and calibration has {len(x)}; give "
            f"more text, or a smaller width"
        )
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)

    def root(z: Tensor) -> Tensor:
        variance = z.T @ z / len(z)
        small = ridge * variance.diag().mean().clamp(min=1e-30)
        return torch.linalg.cholesky(variance + small * torch.eye(len(variance), dtype=z.dtype))

    left = torch.linalg.solve_triangular(root(x), x.T @ y / len(x), upper=False)
    whitened = torch.linalg.solve_triangular(root(y), left.T, upper=False)
    return torch.linalg.svdvals(whitened).clamp(max=1.0)


@dataclass(frozen=True)
class Pruning(Score):
    """PMPQ: the share of its perplexity that the model loses when a layer's smallest weights are set to 0, and no
    other's; the mean over shares of weights.

    by: `block` or `linear` layer.
    """

    shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    by: Unit = "block"

    @property
    def unit(self) -> Unit:
        return self.by

    def sensitivity(self, model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch]) -> dict[str, float]:
        looked_at = first_tokens(batches, self.tokens)
        before = math.exp(mean_loss(model, looked_at))
        found = {}
        for layer in layers:
            lost = 0.0
            for share in self.shares:
                with changed(layer, partial(pruned, share=share)):
                    lost += (math.exp(mean_loss(model, looked_at)) - before) / before
            found[layer.name] = max(0.0, lost / len(self.shares))
        return found


def pruned(weight: Tensor, share: float) -> Tensor:
    """A weight with that share of its entries, the smallest ones, set to 0."""
    count = int(share * weight.numel())
    if not count:
        return weight
    smallest = weight.abs().flatten().topk(count, largest=False).indices
    return weight.flatten().index_fill(0, smallest, 0.0).view_as(weight)


@dataclass(frozen=True)
class Taylor(Score):
    r"""TDMPQ: how steeply the loss changes with a layer's input, `|ℓ(h + δ) - ℓ(h - δ)| / 2|δ|`.

    form: `difference` takes that for random directions δ, `gradient` its limit in the steepest direction, |∂ℓ/∂h|, in
    one backward pass. epsilon: |δ| in units of |h|. directions: random ones, a batch. by: `block` or `linear` layer.
    """

    form: Form = "difference"
    epsilon: float = 1e-2
    directions: int = 4
    by: Unit = "block"
    seed: int = 0

    @property
    def unit(self) -> Unit:
        return self.by

    def sensitivity(self, model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch]) -> dict[str, float]:
        looked_at = first_tokens(batches, self.tokens)
        found = dict.fromkeys((layer.name for layer in layers), 0.0)
        for batch in looked_at:
            for layer, slope in zip(layers, self._slopes(model, layers, batch), strict=True):
                found[layer.name] += slope / len(looked_at)
        return found

    def _slopes(self, model: nn.Module, layers: Sequence[Layer], batch: Batch) -> list[float]:
        if self.form == "gradient":
            return [float(g.float().norm()) for g in input_gradients(model, [x.perturbed for x in layers], batch)]
        draw = torch.Generator().manual_seed(self.seed)
        found = []
        for layer in layers:
            slopes = []
            for _ in range(self.directions):
                seed = int(torch.randint(0, 2**31, (), generator=draw))
                slopes.append(abs(directional_slope(model, layer.perturbed, batch, self.epsilon, seed)))
            found.append(sum(slopes) / len(slopes))
        return found


@torch.no_grad()
def directional_slope(
    model: nn.Module, block: nn.Module, batch: Batch, epsilon: float, direction: int | Tensor
) -> float:
    """`(ℓ(h + δ) - ℓ(h - δ)) / 2|δ|` for δ of length epsilon |h|, in a random direction drawn by that seed, or in one
    that is given, of the shape of the block's input.
    """
    losses, size = [], 1.0

    def moved(sign: int) -> Callable[[Tensor], Tensor]:
        def change(hidden: Tensor) -> Tensor:
            nonlocal size
            if isinstance(direction, Tensor):
                unit = direction.to(hidden)
            else:
                draw = torch.Generator().manual_seed(direction)
                unit = torch.randn(hidden.shape, generator=draw).to(hidden)
            step = unit * (epsilon * hidden.norm() / unit.norm())
            size = float(step.norm())
            return hidden + sign * step

        return change

    for sign in (1, -1):
        with at_input(block, moved(sign)):
            losses.append(mean_loss(model, [batch]))
    return (losses[0] - losses[1]) / (2 * size)


@torch.enable_grad()
def input_gradients(model: nn.Module, blocks: Sequence[nn.Module], batch: Batch) -> list[Tensor]:
    """∂ℓ/∂h of the input h of each block or layer, in one backward pass. Layers that share an input have gradients of
    their own.
    """
    inputs: dict[int, Tensor] = {}

    def kept(number: int) -> Callable[[Tensor], Tensor]:
        def change(hidden: Tensor) -> Tensor:
            inputs[number] = hidden.clone() if hidden.requires_grad else hidden.detach().requires_grad_(True)
            return inputs[number]

        return change

    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            stack.enter_context(at_input(block, kept(number)))
        loss = _loss(model, batch)
    return list(torch.autograd.grad(loss, [inputs[number] for number in range(len(blocks))]))


def damage(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch], rounded: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """By layer, how much the mean loss (nats a token) rises when its weights, and no others, are `rounded`: what a
    sensitivity should foretell.
    """
    before = mean_loss(model, batches)
    found = {}
    for layer in layers:
        with changed(layer, rounded):
            found[layer.name] = mean_loss(model, batches) - before
    return found


# -- running the model -----------------------------------------------------------------------------------------------


def first_tokens(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """The first sequences of the batches, so many that they hold at most that number of tokens (one at least)."""
    found: list[Batch] = []
    left = tokens
    for batch in batches:
        ids = batch.get("input_ids")
        if not isinstance(ids, Tensor):
            raise PosttrainError("a language model's sensitivity is measured on text; expected batches with input_ids")
        rows = min(len(ids), max(left // ids.shape[1], 0 if found else 1))
        if not rows:
            break
        found.append({k: v[:rows] if isinstance(v, Tensor) and len(v) == len(ids) else v for k, v in batch.items()})
        left -= rows * ids.shape[1]
    return found


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Nats a token."""
    count = [b["input_ids"][:, 1:].numel() for b in batches]
    losses = [float(_loss(model, batch)) for batch in batches]
    return sum(loss * n for loss, n in zip(losses, count, strict=True)) / max(sum(count), 1)


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(**batch).logits[:, :-1]
    wanted = batch["input_ids"][:, 1:].to(logits.device)
    losses = [
        nn.functional.cross_entropy(row.float(), target, reduction="sum")  # a row at a time: vocabularies are large
        for row, target in zip(logits, wanted, strict=True)
    ]
    return torch.stack(losses).sum() / wanted.numel()


@contextmanager
def changed(layer: Layer, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, a layer has changed weights; afterwards the same bits as before."""
    before = {name: module.weight.detach().clone() for name, module in layer.modules.items()}
    try:
        with torch.no_grad():
            for module in layer.modules.values():
                module.weight.copy_(change(module.weight.detach()))
        yield
    finally:
        with torch.no_grad():
            for name, module in layer.modules.items():
                module.weight.copy_(before[name])


@contextmanager
def at_input(block: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, a block is given other hidden states."""

    def hook(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any]:
        changed_input = change(_hidden(args, keywords))
        if args:
            return (changed_input, *args[1:]), keywords
        return args, {**keywords, "hidden_states": changed_input}

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _hidden(args: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    return args[0] if args else keywords["hidden_states"]
