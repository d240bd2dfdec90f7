"""The heap of the C library, as `models/allocator.py` sets it: where blocks lie, and what it keeps between them.

A freed block leaves a gap that a later block fills if it fits; the rest of the heap stays with the process. So the heap
is as large as the blocks were at most, and gaps besides. The rules are those of glibc: the smallest gap that a block
fits into, else the untouched end of the heap; a block that fits nowhere extends it, or comes from the system by itself
where it is large, and goes back there when it is freed. Neighbouring gaps become one. The many small blocks between,
of what describes a tensor, are left out; they part gaps, so that a real heap has more of them.
"""

from __future__ import annotations

from bisect import bisect_left, insort

NOTE = 16  # bytes before each block, the heap's own
ALIGNED = 96  # bytes by which a gap must be larger than a block: PyTorch asks for blocks at multiples of 64


class Heap:
    """Addresses in bytes from the heap's start.

    large: blocks from this size on come from the system where they fit nowhere. pad: how much more than it needs the
    heap is extended by. touched: how far the heap was ever used: the memory that it holds.
    """

    def __init__(self, large: int, pad: int) -> None:
        self.large, self.pad = large, pad
        self.touched = self.used = 0
        self._end = self._limit = 0  # where the untouched rest begins, and where it ends
        self._gaps: list[tuple[int, int]] = []  # (size, start), ascending
        self._ends: dict[int, int] = {}  # end of a gap to its start
        self._starts: dict[int, int] = {}  # start of a gap to its end
        self._sizes: dict[int, int] = {}

    def allocate(self, size: int, aligned: int = ALIGNED) -> int | None:
        """The address of a new block; None where it comes from the system. aligned: how much larger than the block a
        gap must be.
        """
        size = (-(-size // NOTE) + 1) * NOTE
        at = bisect_left(self._gaps, (size + aligned, 0))
        if at < len(self._gaps):
            found, start = self._gaps[at]
            self._remove(start)
            if found > size:
                self._add(start + size, start + found)
        else:
            if size + aligned > self._limit - self._end:
                if size + aligned >= self.large:
                    return None
                self._limit = self._end + size + aligned + self.pad
            start, self._end = self._end, self._end + size
        self._sizes[start] = size
        self.used += size
        self.touched = max(self.touched, start + size)
        return start

    def free(self, start: int) -> None:
        """Give a block back."""
        end = start + (size := self._sizes.pop(start))
        self.used -= size
        if start in self._ends:
            before = self._ends[start]
            self._remove(before)
            start = before
        if end in self._starts:
            after = self._starts[end]
            self._remove(end)
            end = after
        if end == self._end:
            self._end = start
        else:
            self._add(start, end)

    def _add(self, start: int, end: int) -> None:
        insort(self._gaps, (end - start, start))
        self._starts[start], self._ends[end] = end, start

    def _remove(self, start: int) -> None:
        end = self._starts.pop(start)
        del self._ends[end]
        del self._gaps[bisect_left(self._gaps, (end - start, start))]
