"""Block reconstruction: what is learned about a block's weights is trained until its outputs are the float block's.

One loop for every method that works so. A method says what stands for a weight (`soft`), which outputs it is held to
(`targets`, `loss`) and how many blocks are trained at once (`window`, `overlap`).

Source: BRECQ, 2021, arXiv 2102.05426; OmniQuant, 2023, arXiv 2308.13137; CBQ, 2023, arXiv 2312.07950 (cards 000 and
147).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from posttrain.compress.calls import Call, run
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.solvers.attention_maps import watched_attention
from posttrain.compress.solvers.learned import SoftLinear, SoftWeight
from posttrain.compress.solvers.rtn import with_bits
from posttrain.compress.solvers.solver import Prepare, Solver, checked
from posttrain.compress.stacks import replace_module
from posttrain.compress.walk import Block, Walk
from posttrain.trajectory import PosttrainError

Target = Literal["float", "prefix"]
Schedule = Literal["constant", "cosine"]
PROBED = 4  # pieces on which the loss of the untrained start is measured


@dataclass
class Known:
    """What a method knows of the whole model before the first block is trained.

    blocks: how many there are. fisher: by a layer's whole name, `[out, in]`, squared gradients summed over sequences.
    outputs: `[block][call]` weights of each block's outputs, of their shape.
    """

    blocks: int = 0
    fisher: dict[str, Tensor] = field(default_factory=dict)
    outputs: list[list[Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class Piece:
    """Some rows of one calibration call: what a step is trained on."""

    call: int
    rows: slice


@dataclass
class Seen:
    """What a window of blocks gives.

    hidden: `[rows, tokens, width]`. maps: of its attention, `[rows, tokens, tokens]`, averaged over heads, where the
    method looks at them. weight: of each output, where they have one.
    """

    hidden: Tensor
    maps: list[Tensor] = field(default_factory=list)
    weight: Tensor | None = None

    def of(self, rows: slice) -> Seen:
        """Some rows of it."""
        weight = None if self.weight is None else self.weight[rows]
        return Seen(self.hidden[rows], [m[rows] for m in self.maps], weight)


@dataclass(frozen=True)
class Reconstruction(Solver):
    """Trains soft weights window by window, and packs each block once it leaves the last window that holds it.

    grid: bits, group, and where training starts. epochs: passes over the calibration text, a window. rows: sequences a
    step. targets: the outputs that the loss compares with: `float`, of the float block on the float model's inputs,
    `prefix`, of the float block on the inputs that the compressed blocks before it give. window: blocks trained at
    once; overlap: how many of them are trained on in the next window. schedule: of every learning rate.

    The loss is divided by that of the untrained start with rounded weights, so that penalties weigh alike in every
    block. The order of the pieces follows from the seed and the block.
    """

    grid: Uniform = field(default_factory=Uniform)
    epochs: int = 5
    rows: int = 4
    targets: tuple[Target, ...] = ("float",)
    window: int = 1
    overlap: int = 0
    schedule: Schedule = "constant"

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.rows < 1:
            raise PosttrainError(f"epochs {self.epochs}, rows {self.rows}: expected at least 0 epochs and 1 row a step")
        if not 0 <= self.overlap < self.window:
            raise PosttrainError(
                f"window {self.window}, overlap {self.overlap}: expected windows of at least one block, which overlap "
                f"by fewer blocks than they hold"
            )

    # -- what a method chooses ---------------------------------------------------------------------------------------

    @abstractmethod
    def soft(self, weight: Tensor, grid: Uniform, block: Block, name: str, known: Known) -> SoftWeight:
        """What stands for a layer's `[out, in]` fp32 weight. grid: with the bits that the layer has."""

    def known(self, blocks: Iterable[Block]) -> Known:
        """What is to be found out before the walk begins."""
        return Known(len(blocks) if isinstance(blocks, Walk) else 0)

    def loss(self, seen: Seen, wanted: dict[Target, Seen]) -> Tensor:
        """How far the outputs are from those wanted: the mean squared error, summed over the targets."""
        return sum((_mse(seen.hidden, w.hidden) for w in wanted.values()), start=torch.zeros(()))

    @property
    def watches_attention(self) -> bool:
        """Whether the loss looks at attention maps."""
        return False

    @property
    def relative(self) -> bool:
        """Whether the loss is divided by that of the start."""
        return True

    # -- the walk ----------------------------------------------------------------------------------------------------

    @property
    def keeps_float(self) -> bool:
        return True

    @property
    def float_inputs(self) -> bool:
        return "float" in self.targets

    def check(self, shape: tuple[int, int], name: str) -> None:
        self.grid.width(shape[1], name)

    def solve_model(self, blocks: Iterable[Block], prepare: Prepare, done: Callable[[Block], None]) -> None:
        known = self.known(blocks)
        opened: list[Opened] = []
        for block in blocks:
            prepare(block)
            opened.append(self.open(block, known))
            if len(opened) == self.window:
                self.train(opened, known)
                for _ in range(self.window - self.overlap):
                    self._close(opened, done)
        if len(opened) > self.overlap or (opened and opened[0].trained == 0):
            self.train(opened, known)
        while opened:
            self._close(opened, done)

    def solve_block(self, block: Block) -> None:
        known = self.known([block])
        opened = self.open(block, known)
        self.train([opened], known)
        opened.close()

    def open(self, block: Block, known: Known) -> Opened:
        """Put soft weights in the place of the block's linear layers."""
        layers = {}
        for name, linear in block.linears.items():
            whole = f"{block.name}.{name}"
            weight = checked(linear.weight.detach().float(), whole)
            soft = self.soft(weight, with_bits(self.grid, block.bits.get(name)), block, name, known)
            layers[name] = SoftLinear(soft, linear, block.quantizers.get(name))
        return Opened(block, layers)

    @staticmethod
    def _close(opened: list[Opened], done: Callable[[Block], None]) -> None:
        """Pack the first block; the others' inputs are then what it gives."""
        first = opened.pop(0)
        first.close()
        given = first.block
        for other in opened:
            hidden = given.outputs()
            other.block.inputs = [call.of(h) for call, h in zip(other.block.inputs, hidden, strict=True)]
            given = other.block
        done(first.block)

    # -- training ----------------------------------------------------------------------------------------------------

    def train(self, opened: Sequence[Opened], known: Known) -> None:
        """Train the soft weights of a window of blocks, which go on from where they are."""
        first = opened[0].block
        wanted = self._lessons(opened, known)
        pieces = pieces_of(first.inputs, self.rows)
        total = self.epochs * len(pieces)
        softs = [layer.soft for each in opened for layer in each.layers.values()]
        for each in opened:
            each.trained += 1
        if not total or not softs:
            return
        unit = self._start(opened, pieces[:PROBED], wanted) if self.relative else 1.0
        optimizer = torch.optim.AdamW([group for soft in softs for group in soft.groups()], weight_decay=0.0)
        rates = [group["lr"] for group in optimizer.param_groups]
        draw = torch.Generator().manual_seed(first.seed * 1009 + first.index)
        step = 0
        with torch.enable_grad(), _watching(opened, self.watches_attention):
            for _ in range(self.epochs):
                for at in torch.randperm(len(pieces), generator=draw).tolist():
                    progress = step / total
                    for group, rate in zip(optimizer.param_groups, rates, strict=True):
                        group["lr"] = rate * _factor(self.schedule, progress)
                    loss = self._step_loss(opened, pieces[at], wanted) / unit
                    for soft in softs:
                        more = soft.penalty(progress)
                        loss = loss if more is None else loss + more
                    if not torch.isfinite(loss):
                        raise PosttrainError(
                            f"{first.name}: the loss of its reconstruction is {float(loss.detach())} at step {step}; "
                            f"lower the learning rate"
                        )
                    step += 1
                    if not loss.requires_grad:  # experts alone, and no token of the piece was sent to one
                        continue
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()

    @torch.no_grad()
    def _lessons(self, opened: Sequence[Opened], known: Known) -> dict[Target, list[Seen]]:
        """By target, the outputs wanted for every call."""
        found: dict[Target, list[Seen]] = {}
        for target in self.targets:
            blocks = [each.block for each in opened]
            start = blocks[0].float_inputs if target == "float" else blocks[0].inputs
            assert start is not None
            before = [_before(block) for block in blocks]
            weights = known.outputs[blocks[-1].index] if known.outputs else [None] * len(start)
            wants_maps = self.watches_attention and target == self.targets[0]
            with watched_attention(before if wants_maps else []) as maps:
                found[target] = []
                for i, call in enumerate(start):
                    maps.clear()
                    hidden = _through([(m, b.inputs[i]) for m, b in zip(before, blocks, strict=True)], call.hidden)
                    found[target].append(Seen(hidden, [m.half() for m in maps], weights[i]))
        return found

    def _step_loss(self, opened: Sequence[Opened], piece: Piece, wanted: dict[Target, list[Seen]]) -> Tensor:
        calls = [cut(each.block.inputs[piece.call], piece.rows) for each in opened]
        maps = opened[0].maps
        maps.clear()
        hidden = _through([(e.block.module, c) for e, c in zip(opened, calls, strict=True)], calls[0].hidden)
        return self.loss(Seen(hidden, list(maps)), {t: seen[piece.call].of(piece.rows) for t, seen in wanted.items()})

    @torch.no_grad()
    def _start(self, opened: Sequence[Opened], pieces: Sequence[Piece], wanted: dict[Target, list[Seen]]) -> float:
        """The mean loss with weights as they would be stored now; 1 where there is none."""
        softs = [layer.soft for each in opened for layer in each.layers.values()]
        for soft in softs:
            soft.committed = True
        with _watching(opened, self.watches_attention):
            found = sum(float(self._step_loss(opened, piece, wanted)) for piece in pieces) / len(pieces)
        for soft in softs:
            soft.committed = False
        return found if math.isfinite(found) and found > 0 else 1.0


class Opened:
    """A block in training. layers: its soft linear layers by name. trained: windows that it went through.

    folds: what is to be done to the rest of the block once its layers are packed.
    """

    def __init__(self, block: Block, layers: dict[str, SoftLinear]) -> None:
        self.block, self.trained = block, 0
        self.maps: list[Tensor] = []
        self.folds: list[Callable[[], None]] = []
        self._asked = [p for p in block.module.parameters() if p.requires_grad]
        for parameter in self._asked:  # norms and biases are not learned
            parameter.requires_grad_(False)
        self.put(layers)

    def put(self, layers: dict[str, SoftLinear]) -> None:
        """Soft layers in the place of the linear ones."""
        self.layers = layers
        for name, layer in layers.items():
            replace_module(self.block.module, name, layer)

    def close(self) -> None:
        """Put packed layers in the place of the soft ones."""
        with torch.no_grad():
            for name, layer in self.layers.items():
                self.block.install(name, layer.soft.pack())
            for fold in self.folds:
                fold()
        for parameter in self._asked:
            parameter.requires_grad_(True)


def pieces_of(calls: Sequence[Call], rows: int) -> list[Piece]:
    """Every call in pieces of that many rows; a call whose masks cannot be cut by rows is one piece."""
    found = []
    for i, call in enumerate(calls):
        count = len(call.hidden)
        step = rows if _cuttable(call, count) else count
        found += [Piece(i, slice(start, min(start + step, count))) for start in range(0, count, step)]
    return found


def cut(call: Call, rows: slice) -> Call:
    """Some rows of a call, with what of its arguments belongs to them."""
    count = len(call.hidden)
    if rows.start == 0 and rows.stop >= max(count, 1):
        return call

    def part(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(part(v) for v in value)
        per_row = isinstance(value, Tensor) and value.ndim > 1 and len(value) > 1
        return value[rows] if per_row else value

    return Call(call.hidden[rows], tuple(map(part, call.arguments)), {k: part(v) for k, v in call.keywords.items()})


def _cuttable(call: Call, count: int) -> bool:
    """Whether everything beside the hidden states is either the same for all rows or has one entry a row."""

    def tensors(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            for v in value:
                yield from tensors(v)

    given = (*call.arguments, *call.keywords.values())
    return all(t.ndim < 2 or len(t) in (1, count) for value in given for t in tensors(value))


def _through(modules: Sequence[tuple[nn.Module, Call]], hidden: Tensor) -> Tensor:
    """The output of blocks one after the other, each with the masks and positions of its own call."""
    for module, call in modules:
        hidden = run(module, call.of(hidden))
    return hidden


def _before(block: Block) -> nn.Module:
    if block.before is None:
        raise ValueError("the walk does not keep the float model; the solver must say keeps_float")
    return block.before


@contextmanager
def _watching(opened: Sequence[Opened], wanted: bool) -> Iterator[None]:
    """Attention maps of the window's forward passes arrive in the first block's list."""
    with watched_attention([each.block.module for each in opened] if wanted else []) as maps:
        opened[0].maps = maps
        yield


def _mse(found: Tensor, wanted: Tensor) -> Tensor:
    return torch.nn.functional.mse_loss(found.float(), wanted.float())


def _factor(schedule: Schedule, progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0
