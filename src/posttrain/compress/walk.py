"""Walking a model block by block in bounded memory: one block's inputs at a time, never the whole model's.

The inputs of a block are the outputs of the one before it: as it is now, compressed (`inputs`), and where a solver asks
for them also as it was (`float_inputs`), so that errors can be corrected or not be carried along, as a method wants.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.compress.calls import Batch, Call, Ended, Recalled, captured, run
from posttrain.compress.experts import holder, routed_inputs, shown_all, together
from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.inputs import InputStep, chain
from posttrain.compress.packed.linear import PackedLinear, TransformedLinear
from posttrain.compress.packed.weight import PackedWeight
from posttrain.compress.stacks import Stack, linears, replace_module, whole_names
from posttrain.trajectory import PosttrainError

NAMED = 3  # experts that a warning names


class Block:
    """One block on the walk.

    name: in the model. module: itself; layers that are done are `PackedLinear`. before: a copy as it was, where asked.
    inputs: its calls with the hidden states that the compressed prefix gives; float_inputs: those of the float model.
    linears: the layers to compress, by name in the block, in the order in which they run.
    stages: their names, those that share an input together, in the order in which they run.
    phases: the stages, with those of the experts of a mixture joined, since experts run beside each other.
    bits: by a layer's name in the block, where an allocation says other than the grid.
    quantizers: by a layer's name, the step that rounds its inputs once it is packed; None where they stay as they are.
    unreached: experts to which no calibration token was sent when their inputs were looked at.
    """

    def __init__(
        self, index: int, name: str, module: nn.Module, inputs: list[Call], before: nn.Module | None,
        float_inputs: list[Call] | None, skip: Sequence[str], bits: dict[str, float], seed: int,
    ) -> None:  # fmt: skip
        self.index, self.name, self.module, self.seed = index, name, module, seed
        self.inputs, self.before, self.float_inputs, self.bits = inputs, before, float_inputs, bits
        self.quantizers: dict[str, InputStep | None] = {}
        self.unreached: dict[str, None] = {}
        self._skip = skip
        self._recalled: dict[str, Recalled] = {}
        self.refresh()

    def refresh(self) -> None:
        """Look at the linear layers anew, after a transform changed the block."""
        found = linears(self.module, self.name, self._skip)
        self.stages, self._once = _stages(self.module, found, self.inputs[0])
        self.phases = together(self.module, self.stages)
        self.linears = {name: found[name] for stage in self.stages for name in stage}
        self.forget()

    @torch.no_grad()
    def outputs(self, calls: Sequence[Call] | None = None, module: nn.Module | None = None) -> list[Tensor]:
        """The block's output hidden states, call by call (its present inputs unless others are given)."""
        if calls is None and module is None:
            return [self._run(i, keep=False) for i in range(len(self.inputs))]
        return [run(module or self.module, call) for call in (self.inputs if calls is None else calls)]

    def settle(self) -> None:
        """Parts of the block whose layers are all packed will not change any more, nor will what they are given, which
        comes from before the layers that are not: from now on their outputs on the present inputs are remembered.
        """
        for part, child in self.module.named_children():
            own = [name for name in self.linears if name.startswith(f"{part}.")]
            packed = all(isinstance(self.module.get_submodule(name), PackedLinear) for name in own)
            if own and packed and part not in self._recalled and self._once.issuperset(own):
                self._recalled[part] = Recalled(child)

    def forget(self) -> None:
        """Compute everything anew from now on: something was changed that was settled."""
        self._recalled.clear()

    def _run(self, index: int, *, keep: bool = True) -> Tensor:
        """The block's outputs of one of its present inputs."""
        with ExitStack() as stack:
            for recalled in self._recalled.values():
                stack.enter_context(recalled.at(index, keep))
            return run(self.module, self.inputs[index])

    def targets(self) -> list[Tensor]:
        """What the float block gives on the float inputs."""
        if self.before is None or self.float_inputs is None:
            raise ValueError("the walk does not follow the float model; the solver must say keeps_float, float_inputs")
        return self.outputs(self.float_inputs, self.before)

    @torch.no_grad()
    def moments(
        self,
        names: Sequence[str],
        *,
        gram: bool = True,
        keep: int = 0,
        calls: Sequence[Call] | None = None,
        weights: Callable[[int], Tensor] | None = None,
        weights_at: Callable[[str], Tensor] | None = None,
    ) -> dict[str, InputMoments]:
        """Statistics of the inputs of some of its linear layers, as the weights meet them. Layers that share an input
        share one object.

        keep: how many token vectors are kept. weights: of the tokens of call i, flat, where they do not count alike;
        weights_at: instead, of the tokens that a layer meets right now (of layers that share an input, the first is
        asked). Experts that no token is sent to are calibrated on all tokens of their layer, and noted as `unreached`.
        """
        stages = [part for stage in self.stages for part in self._alike([n for n in stage if n in names])]
        heads = {stage[0]: stage for stage in stages if stage}
        made = {n: InputMoments(self.linears[n].in_features, gram=gram, keep=keep, seed=self.seed) for n in heads}
        current = 0

        def watch(name: str) -> Callable[..., None]:
            def seen(module: nn.Module, given: tuple[Tensor, ...]) -> None:
                met = module.inputs(given[0]) if isinstance(module, TransformedLinear) else given[0]
                count = weights_at(name) if weights_at is not None else None
                if weights is not None:
                    count, sent = weights(current), routed_inputs(self.module, name)
                    count = count.flatten() if sent is None else count.flatten()[sent.tokens]
                made[name].add(met, count)

            return seen

        def collect(watched: Sequence[str]) -> None:
            nonlocal current
            hooks = [self.module.get_submodule(n).register_forward_pre_hook(watch(n)) for n in watched]
            try:
                for current in range(len(self.inputs if calls is None else calls)):
                    with self._until(watched):
                        if calls is None:
                            self._run(current)
                        else:
                            run(self.module, calls[current])
            finally:
                for hook in hooks:
                    hook.remove()

        collect(list(heads))
        with shown_all(self.module, [n for n in heads if made[n].count == 0]) as unreached:
            if unreached:
                self.unreached |= dict.fromkeys(self._expert(n) for n in unreached)
                collect(unreached)
        return {name: made[head] for head, stage in heads.items() for name in stage}

    @contextmanager
    def _until(self, names: Sequence[str]) -> Iterator[None]:
        """Inside, a call of the block ends with the last of these layers' inputs: what comes after is not wanted.

        Not if one of them was called more or less than once when the block was looked at.
        """
        left = set(names)

        def seen(name: str) -> Callable[..., None]:
            def met(module: nn.Module, given: tuple[Tensor, ...]) -> None:
                left.discard(name)
                if not left:
                    raise Ended

            return met

        watched = names if left <= self._once else []
        hooks = [self.module.get_submodule(n).register_forward_pre_hook(seen(n)) for n in watched]
        try:
            with suppress(Ended):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def experts(self) -> list[str]:
        """The experts that hold layers to compress."""
        return list(dict.fromkeys(self._expert(n) for n in self.linears if holder(self.module, n) is not None))

    def _expert(self, name: str) -> str:
        """The whole name of the expert that a layer belongs to."""
        return f"{self.name}.{name}".rpartition(".")[0]

    def _alike(self, names: list[str]) -> list[list[str]]:
        """Layers of a stage whose weights meet the same inputs: one with steps of its own before it stands alone."""
        own = [[n] for n in names if isinstance(self.linears[n], TransformedLinear)]
        return [*own, [n for n in names if [n] not in own]]

    def install(self, name: str, weight: PackedWeight) -> PackedLinear:
        """Put a packed layer in the place of a linear one, behind the steps that its inputs go through."""
        linear = self.linears[name]
        steps: list[Any] = list(linear.inputs) if isinstance(linear, TransformedLinear) else []
        made = PackedLinear(weight, linear.bias, chain([*steps, self.quantizers.get(name)]))
        replace_module(self.module, name, made)
        return made


class Walk:
    """The blocks of a stack, in order, each with its inputs.

    batches: calibration, the keyword arguments of a forward pass of the model each. keeps_float: keep a copy of each
    block as it was, and, unless float_inputs is off, carry the float model's hidden states along. bits: of layers by
    their whole name in the model, where they differ from the grid's.
    """

    def __init__(
        self,
        model: nn.Module,
        stack: Stack,
        batches: Sequence[Batch],
        *,
        keeps_float: bool = False,
        float_inputs: bool = True,
        skip: Sequence[str] = (),
        bits: dict[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        if not batches:
            raise PosttrainError("calibration is empty; expected at least one sequence of text")
        self.model, self.stack, self.skip, self.bits, self.seed = model, stack, skip, bits or {}, seed
        self.batches = batches
        self.keeps_float, self.float_inputs = keeps_float, keeps_float and float_inputs
        self._calls = captured(model, stack, batches)  # [block][batch]: hidden states of the first block alone

    def __len__(self) -> int:
        return len(self.stack.blocks)

    def __iter__(self) -> Iterator[Block]:
        hidden = [call.hidden for call in self._calls[0]]
        plain = list(hidden) if self.float_inputs else None
        experts: list[str] = []
        unreached: list[str] = []
        for index, (name, module) in enumerate(whole_names(self.stack)):
            calls = self._calls[index]
            inputs = [call.of(h) for call, h in zip(calls, hidden, strict=True)]
            known = None if plain is None else [call.of(h) for call, h in zip(calls, plain, strict=True)]
            before = copy.deepcopy(module) if self.keeps_float else None
            bits = {n.removeprefix(f"{name}."): b for n, b in self.bits.items() if n.startswith(f"{name}.")}
            block = Block(index, name, module, inputs, before, known, self.skip, bits, self.seed)
            experts += block.experts
            yield block
            unreached += block.unreached
            if index + 1 < len(self):
                hidden = block.outputs()
                if plain is not None:
                    plain = block.targets()
            self._calls[index] = []  # its masks and inputs are no longer needed
        if unreached:  # once for the whole walk: a mixture and a short text would fill the screen
            named = ", ".join([*unreached[:NAMED], *(["..."] if len(unreached) > NAMED else [])])
            warnings.warn(
                f"no calibration token reached {len(unreached)} of {len(experts)} experts ({named}); they are "
                f"calibrated on all tokens of their layer: give more text",
                stacklevel=1,  # a caller further out may be one of torch's decorators, whose warnings are not shown
            )


def _stages(block: nn.Module, layers: dict[str, nn.Linear], call: Call) -> tuple[list[list[str]], set[str]]:
    """Names of linear layers, those that share an input tensor together, in the order in which they run; and those that
    are called once.

    A layer that the call does not reach (an expert that no token was sent to) is a stage of its own at the end.
    """
    inputs: dict[int, list[str]] = {}
    times: Counter[str] = Counter()
    alive: list[Tensor] = []  # so that no two inputs get the same id

    def watch(name: str) -> Callable[..., None]:
        def seen(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            times[name] += 1
            if times[name] == 1:
                alive.append(given[0])
                inputs.setdefault(id(given[0]), []).append(name)

        return seen

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            run(block, call.of(call.hidden[:1]) if _rows_apart(call) else call)
    finally:
        for hook in hooks:
            hook.remove()
    stages = [*inputs.values(), *([name] for name in layers if not times[name])]
    return stages, {name for name in layers if times[name] == 1 and holder(block, name) is None}


def _rows_apart(call: Call) -> bool:
    """Whether one row of the call can be run alone: nothing else that it is given has rows."""
    return not any(isinstance(v, Tensor | tuple) for v in (*call.arguments, *call.keywords.values()))
