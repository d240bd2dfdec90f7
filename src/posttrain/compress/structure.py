"""Which parts of a block feed which linear layers, found by trying: where a scale, a shift or a rotation can be folded.

No architecture is known by name. What a norm's output reaches is seen in a run of the block; whether everything that
reads it is known is tried: its gain is divided by random positive numbers and its readers are multiplied by them, and
the block must give what it gave before. Pairs of linear layers are tried in the same way.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from posttrain.compress.calls import Call, Ended, run
from posttrain.compress.fold import NormSite, Pair, Parameters, Read, parameters
from posttrain.compress.moments import InputMoments
from posttrain.compress.walk import Block
from posttrain.trajectory import PosttrainError

TOLERANCE, NOISE = 1e-5, 1e-6  # errors allowed, relative to what a block adds, and to what it gives
MOST_TRIALS = 64


@dataclass(frozen=True, eq=False)
class Structure:
    """What was found in a block.

    norms: in the order in which they run, those with linear layers behind them. refused: norms that feed linear layers
    and something else that cannot be scaled with them (the residual of a post-norm block), with those layers.
    queries_keys: layers whose outputs are multiplied with each other before a softmax.
    """

    norms: tuple[NormSite, ...]
    pairs: tuple[Pair, ...]
    refused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    queries_keys: frozenset[str] = frozenset()


def structure(block: Block) -> Structure:
    """What feeds what in a block, tried on a float copy of it."""
    return Bench(block).structure()


def foldable(block: Block, what: str) -> Structure:
    """The structure of a block in which everything that a norm feeds can be scaled; PosttrainError, that says why and
    names the transform `what`, where it cannot.
    """
    found = structure(block)
    kept = {norm: names for norm, names in found.refused.items() if set(names) & set(block.linears)}
    for norm, names in kept.items():
        raise PosttrainError(
            f"{what} cannot fold a scale into {block.name}.{norm}: beside {', '.join(names)} it feeds something that "
            f"takes no scale back (the residual of a post-norm block, as in BERT); choose a method without folding"
        )
    if not any(set(site.linears) & set(block.linears) for site in found.norms):
        raise PosttrainError(
            f"{what}: no norm with a gain feeds a linear layer that is compressed in {block.name} "
            f"({type(block.module).__name__}); there is nothing to fold a scale into"
        )
    return found


@torch.no_grad()
def norm_outputs(block: Block, norms: Sequence[str], *, keep: int = 0) -> dict[str, InputMoments]:
    """Statistics of what norms give, over all tokens (those of an expert see only the tokens that it is sent)."""
    widths = {name: len(block.module.get_parameter(f"{name}.weight")) for name in norms}
    made = {name: InputMoments(widths[name], gram=False, keep=keep, seed=block.seed) for name in norms}

    seen: list[str] = []  # in the present call
    once = False  # whether each was called once in the first call, so that later ones may end with the last of them

    def watch(name: str) -> Callable[..., None]:
        def gave(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
            made[name].add(output)
            seen.append(name)
            if once and len(seen) == len(norms):
                raise Ended

        return gave

    hooks = [block.module.get_submodule(name).register_forward_hook(watch(name)) for name in norms]
    try:
        for call in block.inputs:
            seen.clear()
            with suppress(Ended):
                run(block.module, call)
            once = sorted(seen) == sorted(norms)
    finally:
        for hook in hooks:
            hook.remove()
    return made


# -- trying ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Seen:
    """A module's first floating input, and its output, in the run that is tried on."""

    inputs: Tensor
    outputs: Tensor | None

    @property
    def width(self) -> int:
        return self.inputs.shape[-1]


class Bench:
    """A float copy of a block and one small call of it, on which changes are tried. The block itself stays as it is.

    output: what it gives. seen: of each module with parameters of its own that ran, in order.
    """

    @torch.no_grad()
    def __init__(self, block: Block) -> None:
        self.name = block.name
        self.module = copy.deepcopy(block.module).float()
        self.call, self.output = _small(self.module, block.inputs[0])
        self.now = parameters(self.module)
        self.seen: dict[str, _Seen] = {}
        owners = {name for name, m in self.module.named_modules() if name and any(True for _ in m.parameters(False))}
        hooks = [
            self.module.get_submodule(name).register_forward_hook(self._watch(name), with_kwargs=True)
            for name in owners
        ]
        try:
            run(self.module, self.call)
        finally:
            for hook in hooks:
                hook.remove()
        self._draw = torch.Generator().manual_seed(0)

    def _watch(self, name: str) -> Callable[..., None]:
        def seen(module: nn.Module, given: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            tensors = [t for t in (*given, *keywords.values()) if isinstance(t, Tensor) and t.is_floating_point()]
            if tensors and name not in self.seen:
                self.seen[name] = _Seen(tensors[0], output if isinstance(output, Tensor) else None)

        return seen

    @torch.no_grad()
    def run(self, changes: Parameters, hidden: Tensor | None = None) -> Tensor:
        """The block's output with some parameters changed."""
        call = self.call if hidden is None else self.call.of(hidden)
        out = functional_call(self.module, dict(changes), (call.hidden, *call.arguments), call.keywords)
        return out[0] if isinstance(out, tuple) else out

    def unchanged(self, changes: Parameters) -> bool:
        """Whether the block gives the same with some parameters changed."""
        error = float((self.run(changes) - self.output).norm())
        added = float((self.output - self.call.hidden).norm())
        return error <= TOLERANCE * added + NOISE * float(self.output.norm())

    @property
    def linears(self) -> list[str]:
        """The linear layers that ran, in order."""
        return [name for name in self.seen if isinstance(self.module.get_submodule(name), nn.Linear)]

    def structure(self) -> Structure:
        norms: list[NormSite] = []
        refused: dict[str, tuple[str, ...]] = {}
        fed: set[str] = set()
        for name in self.seen:
            offset = gain_offset(self.module.get_submodule(name), self.seen[name].inputs, self.seen[name].outputs)
            if offset is None:
                continue
            layers, others = self._readers(name)
            fed |= {*layers}
            if not layers:
                continue
            site = self._site(name, offset, layers, others)
            if site is None:
                refused[name] = layers
            else:
                norms.append(site)
        pairs = [pair for name in self.linears if name not in fed if (pair := self._pair(name)) is not None]
        queries_keys = self._queries_keys(pairs)
        return Structure(tuple(norms), _attending(pairs, queries_keys, self._shared()), refused, queries_keys)

    # -- norms

    def _readers(self, norm: str) -> tuple[tuple[str, ...], list[str]]:
        """Linear layers whose inputs are rows of a norm's output, and other modules whose inputs are."""
        outputs = self.seen[norm].outputs
        assert outputs is not None
        rows = {row.tobytes() for row in outputs.reshape(-1, outputs.shape[-1]).numpy()}
        found = [n for n, s in self.seen.items() if n != norm and s.width == outputs.shape[-1] and _within(s, rows)]
        layers = {n for n in found if isinstance(self.module.get_submodule(n), nn.Linear)}
        alike = {_pattern(n) for n in layers}
        layers |= {  # experts that no token was sent to read what their siblings read
            name for name, m in self.module.named_modules()
            if isinstance(m, nn.Linear) and name not in self.seen and _pattern(name) in alike
        }  # fmt: skip
        ordered = [n for n, _ in self.module.named_modules() if n in layers]
        return tuple(ordered), [n for n in found if n not in layers]

    def _site(self, norm: str, offset: float, layers: tuple[str, ...], others: list[str]) -> NormSite | None:
        width, bias = self.seen[norm].width, f"{norm}.bias" in self.now
        choices = []
        for name in others:
            for parameter, value in self.module.get_submodule(name).named_parameters(recurse=False):
                axes = [axis for axis, size in enumerate(value.shape) if size == width and value.ndim > 1]
                choices.append([*(Read(f"{name}.{parameter}", axis) for axis in axes), None])
        scale = self._scale(width)
        for chosen in itertools.islice(itertools.product(*choices), MOST_TRIALS):
            site = NormSite(norm, offset, bias, layers, tuple(read for read in chosen if read is not None))
            if self.unchanged(site.scaled(self.now, scale)):
                return site
        return None

    # -- pairs

    def _pair(self, second: str) -> Pair | None:
        """The pair that ends in a layer, if one of the layers before it feeds it channel by channel."""
        columns = self.seen[second].width
        before = list(itertools.takewhile(lambda name: name != second, self.linears))
        for first in sorted(before, key=lambda name: (_shared_depth(name, second), before.index(name)), reverse=True):
            weight = self.now[f"{first}.weight"]
            for rows, attention in _row_sets(len(weight), columns, self.head_width):
                source = _source(len(rows), columns, self.head_width)
                if source is None:
                    continue
                pair = Pair(first, second, rows, source, attention)
                if self.unchanged(pair.scaled(self.now, self._scale(len(rows)))):
                    return pair
        return None

    def _queries_keys(self, pairs: list[Pair]) -> frozenset[str]:
        """Layers that share an input and whose outputs meet in a product: twice the one is half the other's."""
        found = {pair.first for pair in pairs if pair.attention}
        firsts = {pair.first for pair in pairs}
        for names in self._shared():
            for one, other in itertools.combinations([n for n in names if n not in firsts], 2):
                changes: dict[str, Tensor] = {}
                for name, factor in ((one, 2.0), (other, 0.5)):
                    both = (f"{name}.weight", f"{name}.bias")
                    changes |= {p: self.now[p] * factor for p in both if p in self.now}
                if self.unchanged(changes):
                    found |= {one, other}
        return frozenset(found)

    def _shared(self) -> list[list[str]]:
        """Linear layers by the input that they share."""
        groups: dict[tuple[int, torch.Size], list[str]] = {}
        for name in self.linears:
            inputs = self.seen[name].inputs
            groups.setdefault((inputs.data_ptr(), inputs.shape), []).append(name)
        return list(groups.values())

    @property
    def head_width(self) -> int | None:
        """Channels of an attention head, where a module says so."""
        for module in self.module.modules():
            for word in ("head_dim", "head_size"):
                if isinstance(found := getattr(module, word, None), int):
                    return found
        return None

    def _scale(self, width: int) -> Tensor:
        """`[width]` random scales between a half and two."""
        return torch.exp2(2 * torch.rand(width, generator=self._draw) - 1)


def gain_offset(norm: nn.Module, inputs: Tensor, outputs: Tensor | None) -> float | None:
    """0 where a module multiplies each channel by its `weight` and adds its `bias`, if it has one; 1 where it
    multiplies by 1 + weight. None of anything else.
    """
    own = dict(norm.named_parameters(recurse=False))
    gain, bias = own.get("weight"), own.get("bias")
    if gain is None or outputs is None or set(own) - {"weight", "bias"} or any(p.ndim != 1 for p in own.values()):
        return None
    if inputs.shape != outputs.shape or inputs.shape[-1] != len(gain):
        return None
    scale = torch.linspace(0.5, 2.0, len(gain))[torch.randperm(len(gain), generator=torch.Generator().manual_seed(0))]
    for offset in (0.0, 1.0):
        changed = {"weight": (gain + offset) / scale - offset}
        if bias is not None:
            changed["bias"] = bias / scale
        with torch.no_grad():
            found = functional_call(norm, changed, (inputs,))
        if (found - outputs / scale).norm() <= TOLERANCE * outputs.norm():
            return offset
    return None


def _within(seen: _Seen, rows: set[bytes]) -> bool:
    return all(row.tobytes() in rows for row in seen.inputs.reshape(-1, seen.width).numpy())


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _shared_depth(one: str, other: str) -> int:
    """How many parts of two dotted names agree from the left."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _row_sets(rows: int, columns: int, head: int | None) -> Iterator[tuple[Tensor, bool]]:
    """Which rows of a layer may become the columns of a later one: all, a half of two fused layers, or the values of
    fused queries, keys and values, which lie behind one another or head by head. And whether that is attention.
    """
    every = torch.arange(rows)
    if columns % rows == 0:
        yield every, False
    if rows == 2 * columns:
        yield every[columns:], False
        yield every[:columns], False
    beside, odd = divmod(rows - columns, 2)
    if beside > 0 and not odd and columns % beside == 0:
        yield every[-beside:], True
    if rows == 3 * columns and head and columns % head == 0:
        yield every.view(-1, 3, head)[:, 2].flatten(), True


def _source(rows: int, columns: int, head: int | None) -> Tensor | None:
    """`[columns]` which row feeds each column; of heads that share values, their groups' common ones."""
    if rows == columns:
        return torch.arange(columns)
    if not head or rows % head or columns % head:
        return None
    return torch.arange(rows).view(-1, head).repeat_interleave(columns // rows, 0).flatten()


def _attending(pairs: list[Pair], queries_keys: frozenset[str], shared: list[list[str]]) -> tuple[Pair, ...]:
    """The pairs, those of values marked whose layer shares its input with queries and keys."""
    beside = {name for names in shared if queries_keys & set(names) for name in names}
    return tuple(Pair(p.first, p.second, p.rows, p.source, p.attention or p.first in beside) for p in pairs)


def _small(module: nn.Module, call: Call) -> tuple[Call, Tensor]:
    """The first row of a call in fp32 with its output, if a row gives alone what it gives beside others; else the
    whole call.
    """
    call = _mapped(call, lambda t: t.float() if t.is_floating_point() else t)
    whole, rows = run(module, call), len(call.hidden)
    if rows > 1:
        first = _mapped(call, lambda t: t[:1] if t.ndim and len(t) == rows else t)
        try:
            alone = run(module, first)
        except (RuntimeError, ValueError, IndexError):
            return call, whole
        if alone.shape == whole[:1].shape and (alone - whole[:1]).norm() <= TOLERANCE * whole[:1].norm():
            return first, alone
    return call, whole


def _mapped(call: Call, change: Callable[[Tensor], Tensor]) -> Call:
    """A call with each of its tensors changed, those in tuples too."""

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        return tuple(of(v) for v in value) if isinstance(value, tuple) else value

    return Call(of(call.hidden), tuple(of(v) for v in call.arguments), {k: of(v) for k, v in call.keywords.items()})
