"""A ledger of memory: every tensor that a piece of code makes on a device, as long as it lives, by what it is for.

It looks at the operations underneath autograd, so that it sees what a forward pass saves for the backward pass, what a
backward pass allocates, and when each is let go of. On the `meta` device tensors have sizes and no memory, so that the
training of a model of any size can be rehearsed on a laptop; on the CPU the same ledger counts real tensors.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from posttrain.plan.heap import Heap

Part = Literal[
    "weights", "masters", "moments", "gradients", "reference", "teacher", "critic",
    "activations", "vocabulary", "cache", "workspace", "kept",
]  # fmt: skip
PARTS: dict[Part, str] = {
    "weights": "the model as it computes, adapters included",
    "masters": "fp32 copies of trained weights of a lower precision",
    "moments": "two fp32 moments of AdamW",
    "gradients": "sums over micro-batches, fp32",
    "reference": "the frozen policy",
    "teacher": "the teacher",
    "critic": "the value head",
    "activations": "what a micro-batch's forward pass keeps for the backward pass",
    "vocabulary": "logits in chunks, the gradient of the vocabulary matrix",
    "cache": "keys and values of completions that are being drawn",
    "workspace": "gradients of activations and other passing tensors",
    "kept": "gaps between blocks, which the heap keeps",
}
SPREAD: tuple[Part, ...] = ("weights", "masters", "moments", "gradients", "reference")  # over devices, by FSDP


@dataclass(slots=True)
class Peak:
    """bytes: the most that was held at once. parts: how it was made up then. work: floating-point operations."""

    bytes: float = 0.0
    parts: dict[Part, float] = field(default_factory=dict)
    work: float = 0.0


@dataclass(slots=True)
class _Entry:
    """A storage: its bytes as counted, its part, and its place in the heap, where it is in there."""

    storage: weakref.ref[Any]
    size: float
    part: Part
    place: int | None


@functools.cache
def _composite(func: Any) -> bool:
    """Whether an operation is nothing but others."""
    name = func.name()
    has: Callable[[str, str], bool] = torch._C._dispatch_has_kernel_for_dispatch_key
    return has(name, "CompositeImplicitAutograd") and not has(name, "Meta")


def _number(tensor: Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return not hasattr(tensor, "asked_of_any")
    return 1.0 if tensor.dtype.is_floating_point else 1


class Ledger(TorchDispatchMode):
    """Counts tensors that are made on `device` while it is active, and those that `hold` is told of.

    heap: where blocks lie, of a C library whose heap does not shrink; without one, what is freed is gone.
    share: how much of a part's bytes is counted (1 where nothing is said), since what is spread over devices is on each
        only in part.
    peak: the most that the process held. phases: the most that lived in each named stretch, and its work.
    """

    def __init__(
        self, device: str = "meta", heap: Heap | None = None, share: Mapping[Part, float] | None = None
    ) -> None:
        super().__init__()
        self.device, self.heap, self.share = device, heap, dict(share or {})
        self.live: Counter[Part] = Counter()
        self.phases: dict[str, Peak] = {}
        self.peak = Peak()
        self._entries: dict[int, _Entry] = {}
        self._bytes = 0.0  # of what is not in the heap
        self._part: Part = "workspace"
        self._phase = Peak()

    # -- what the rehearsal says -------------------------------------------------------------------------------------

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """What is made inside is of this part."""
        before = self.switch(name)
        try:
            yield
        finally:
            self._part = before

    def switch(self, name: Part) -> Part:
        """From now on tensors are of this part; returns what they were of."""
        before, self._part = self._part, name
        return before

    @contextmanager
    def phase(self, name: str) -> Iterator[Peak]:
        """A named stretch with a peak and work of its own."""
        before, self._phase = self._phase, self.phases.setdefault(name, Peak())
        self._note()
        try:
            yield self._phase
        finally:
            self._phase = before

    def hold(self, tensors: Iterable[Tensor], name: Part) -> None:
        """Count tensors that are there already, or count them to another part or by another share."""
        for tensor in tensors:
            entry = self._entry(tensor)
            if entry is None:
                with self.part(name):
                    self._see(tensor)
                continue
            self.live[entry.part] -= entry.size  # type: ignore[assignment]
            self._bytes -= 0 if entry.place is not None else entry.size
            entry.part, entry.size = name, self._size(tensor, name)
            self.live[name] += entry.size  # type: ignore[assignment]
            self._bytes += 0 if entry.place is not None else entry.size
            self._note()

    def drop(self, tensor: Tensor) -> None:
        """Count a tensor no longer."""
        entry = self._entry(tensor)
        if entry is not None:
            self._forget(id(tensor.untyped_storage()), entry.storage)

    # -- what happens ------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            # a number is read from a tensor that holds none; what is asked of all is so, and of any is not
            return _number(args[0])
        if _composite(func):  # without autograd, operations arrive here before they are taken apart
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        for found in tree_leaves(out):
            if isinstance(found, Tensor):
                self._see(found)
        if func._overloadpacket is torch.ops.aten.any:
            out.asked_of_any = True
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.worked(formula(*args, **kwargs, out_val=out))
        return out

    def worked(self, operations: float) -> None:
        """Floating-point operations that were done; those of matrix products are counted without being told."""
        self.peak.work += operations
        self._phase.work += operations

    def _see(self, tensor: Tensor) -> None:
        if tensor.device.type != self.device or tensor.is_mkldnn or self._entry(tensor) is not None:
            return  # of another device, oneDNN's own, of which PyTorch tells no size, a view, or changed in place
        storage, part = tensor.untyped_storage(), self._part
        key, size = id(storage), self._size(tensor, part)
        place = None if self.heap is None else self.heap.allocate(int(size))
        gone = weakref.ref(storage, lambda which: self._forget(key, which))
        self._entries[key] = _Entry(gone, size, part, place)
        self.live[part] += size  # type: ignore[assignment]
        if place is None:
            self._bytes += size
        self._note()

    def _size(self, tensor: Tensor, part: Part) -> float:
        return tensor.untyped_storage().nbytes() * self.share.get(part, 1.0)

    def _entry(self, tensor: Tensor) -> _Entry | None:
        """What is known of a tensor's storage; the place of one that is gone may be another's by now."""
        storage = tensor.untyped_storage()
        entry = self._entries.get(id(storage))
        return entry if entry is not None and entry.storage() is storage else None

    def _forget(self, key: int, which: weakref.ref[Any]) -> None:
        entry = self._entries.get(key)
        if entry is None or entry.storage is not which:
            return
        del self._entries[key]
        self.live[entry.part] -= entry.size  # type: ignore[assignment]
        if self.heap is not None and entry.place is not None:
            self.heap.free(entry.place)
        else:
            self._bytes -= entry.size

    @property
    def held(self) -> float:
        """Bytes that the process holds now, what its heap keeps between blocks included."""
        return self._bytes + (self.heap.touched if self.heap is not None else 0)

    def _note(self) -> None:
        """Remember the most that was held in all, and in the phase the most that lived: what the heap keeps from before
        is no matter of the phase.
        """
        if self.held > self.peak.bytes:
            self.peak.bytes, self.peak.parts = self.held, self._alive()
            if (idle := self.held - sum(self.peak.parts.values())) > 1:
                self.peak.parts["kept"] = idle
        if (living := self._bytes + (self.heap.used if self.heap is not None else 0)) > self._phase.bytes:
            self._phase.bytes, self._phase.parts = living, self._alive()

    def _alive(self) -> dict[Part, float]:
        return {name: size for name, size in self.live.items() if size > 0}
