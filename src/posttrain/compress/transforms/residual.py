"""What reads and what writes the residual stream: of each block, and at the two ends of a language model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from posttrain.compress.calls import Batch
from posttrain.compress.fold import NormSite, Parameters, Read, along
from posttrain.compress.stacks import Stack
from posttrain.compress.structure import Bench, gain_offset
from posttrain.compress.walk import Block
from posttrain.trajectory import PosttrainError

TOLERANCE, NOISE = 1e-4, 1e-6  # errors allowed, relative to what a block adds, and to what it gives
SMALLEST_GAIN = 1e-4  # of a norm with a bias, relative to its largest


def turned(value: Tensor, axis: int, rotation: Tensor) -> Tensor:
    """A tensor whose vectors along an axis are multiplied by Q from the right, in fp64."""
    return (value.double().movedim(axis, -1) @ rotation).movedim(-1, axis)


def is_centred(norm: nn.Module, inputs: Tensor) -> bool:
    """Whether a norm takes the mean of the channels off."""
    normed = norm(inputs)
    return bool((norm(inputs + 1.0) - normed).norm() <= 1e-3 * normed.norm())


def _folded(gain: Tensor, bias: Tensor | None, offset: float, rotation: Tensor, name: str) -> dict[str, Tensor]:
    """A norm's parameters after its gain went into what reads it and its outputs were turned."""
    made = {"weight": torch.ones_like(gain) - offset}
    if bias is not None:
        if float(gain.abs().min()) <= SMALLEST_GAIN * float(gain.abs().max()):
            raise PosttrainError(f"{name} has a bias and gains of 0, so that its gain cannot be folded; do not rotate")
        made["bias"] = turned(bias.float() / gain, 0, rotation)
    return made


@dataclass(eq=False)
class Residual:
    """What is rotated in one block.

    sites: the norms of the stream with what reads them; writers: parameters whose outputs are added to the stream.
    centred: whether one of the norms takes the mean of the channels off.
    """

    name: str
    module: nn.Module
    bench: Bench
    sites: tuple[NormSite, ...]
    writers: tuple[Read, ...]
    centred: bool

    def rotated(self, now: Parameters, rotation: Tensor) -> dict[str, Tensor]:
        """Parameters with which the block works on the rotated stream."""
        changed: dict[str, Tensor] = {}
        for site in self.sites:
            name, gain = f"{self.name}.{site.norm}", site.gain(now)
            folded = _folded(gain, now.get(f"{site.norm}.bias"), site.offset, rotation, name)
            changed |= {f"{site.norm}.{last}": value for last, value in folded.items()}
            for read in (*(Read(f"{linear}.weight", 1) for linear in site.linears), *site.others):
                value = along(now[read.parameter].float(), read.axis, gain)
                changed[read.parameter] = turned(value, read.axis, rotation)
        for written in self.writers:
            changed[written.parameter] = turned(now[written.parameter], written.axis, rotation)
        return changed

    def check(self, rotation: Tensor) -> None:
        """PosttrainError unless the rotated block gives rotated outputs on rotated inputs."""
        bench = self.bench
        changes = {name: value.float() for name, value in self.rotated(bench.now, rotation).items()}
        found = bench.run(changes, turned(bench.call.hidden, -1, rotation).float())
        wanted, added = turned(bench.output, -1, rotation), bench.output - bench.call.hidden
        if not (found - wanted).norm() <= TOLERANCE * added.norm() + NOISE * wanted.norm():
            raise PosttrainError(
                f"{self.name} ({type(self.module).__name__}) cannot be rotated: something else than linear layers "
                f"behind plain norms reads or writes its residual stream (such as a norm on a layer's outputs)"
            )


def residual(block: Block, width: int) -> Residual:
    """What reads and writes the stream of a block; PosttrainError where something else than linear layers does."""
    bench = Bench(block)
    found = bench.structure()
    for norm, names in found.refused.items():
        raise PosttrainError(
            f"{block.name} cannot be rotated: {norm} feeds {', '.join(names)} and something else beside them, such as "
            f"the residual stream of a post-norm block"
        )
    sites = tuple(site for site in found.norms if bench.seen[site.norm].width == width)
    readers = {name for site in sites for name in site.linears}
    writers = [
        Read(f"{name}.{last}", 0)
        for name, layer in bench.module.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == width and name not in readers
        for last in ("weight", "bias")
        if f"{name}.{last}" in bench.now
    ]
    reads = {read.parameter for site in sites for read in site.others}
    for owner in {parameter.rpartition(".")[0] for parameter in reads}:  # a fused layer that reads may write as well
        for name, value in bench.module.get_submodule(owner).named_parameters(owner, recurse=False):
            if name not in reads and value.ndim > 1 and width in value.shape:
                writers.append(Read(name, value.shape.index(width)))
    norms = [(bench.module.get_submodule(site.norm), bench.seen[site.norm].inputs) for site in sites]
    centred = any(is_centred(norm, inputs) for norm, inputs in norms)
    return Residual(block.name, block.module, bench, sites, tuple(writers), centred)


class Ends:
    """The last norm and the vocabulary projection behind it, found in one run of the model.

    norm, head: of the model. hidden: what the norm is given, fp32.
    """

    @torch.no_grad()
    def __init__(self, model: Any, stack: Stack, batch: Batch) -> None:
        self.head: nn.Linear = model.get_output_embeddings()
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        last: dict[str, Tensor] = {}

        def watch(name: str) -> Callable[..., None]:
            def noted(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
                if given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
                    seen[name] = (given[0], output)

            return noted

        def noted_block(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            last["output"] = output[0] if isinstance(output, tuple) else output

        inside = tuple(f"{stack.name}.{i}" for i in range(len(stack.blocks)))
        outside = [
            n for n, m in model.named_modules() if not n.startswith(inside) and getattr(m, "weight", None) is not None
        ]
        hooks = [model.get_submodule(name).register_forward_hook(watch(name)) for name in outside]
        hooks.append(stack.blocks[-1].register_forward_hook(noted_block))
        try:
            model(**batch)
        finally:
            for hook in hooks:
                hook.remove()
        given = next((i for n, (i, _) in seen.items() if model.get_submodule(n) is self.head), None)
        for name, (inputs, output) in seen.items():
            if given is None or output.shape != given.shape or not torch.equal(output, given):
                continue
            copied, inputs = copy.deepcopy(model.get_submodule(name)).float(), inputs.float()
            offset = gain_offset(copied, inputs, copied(inputs))
            if offset is not None and torch.equal(inputs, last["output"].float()):
                self.norm, self.offset, self._copy, self.hidden = model.get_submodule(name), offset, copied, inputs
                return
        raise PosttrainError(
            f"{type(model).__name__} cannot be rotated: expected one norm between its last block and its vocabulary "
            f"projection, and nothing else"
        )

    @property
    def centred(self) -> bool:
        return is_centred(self._copy, self.hidden)

    @property
    def _gain(self) -> Tensor:
        return self._copy.get_parameter("weight").detach() + self.offset

    def norm_rotated(self, rotation: Tensor) -> dict[str, Tensor]:
        """The norm's parameters for the rotated stream."""
        bias = dict(self._copy.named_parameters()).get("bias")
        return _folded(self._gain, bias, self.offset, rotation, "the last norm")

    def head_rotated(self, rotation: Tensor) -> Tensor:
        """The projection's weight for the rotated stream."""
        return turned(self.head.weight.float() * self._gain, 1, rotation)

    @torch.no_grad()
    def check(self, rotation: Tensor) -> None:
        """PosttrainError unless the rotated ends give the same logits."""
        changed = {name: value.float() for name, value in self.norm_rotated(rotation).items()}
        normed = functional_call(self._copy, changed, (turned(self.hidden, -1, rotation).float(),))
        found = F.linear(normed, self.head_rotated(rotation).float())
        wanted = F.linear(self._copy(self.hidden), self.head.weight.float())
        if not (found - wanted).norm() <= TOLERANCE * wanted.norm():
            raise PosttrainError("the last norm and the vocabulary projection cannot be rotated: logits would change")
