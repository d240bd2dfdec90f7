"""The heap: blocks, gaps and what is kept, by hand and by invariants."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from posttrain.plan.heap import ALIGNED, NOTE, Heap

KIB = 1024


def test_a_gap_is_filled_by_what_fits_and_only_by_that() -> None:
    heap = Heap(large=1 << 20, pad=0)
    first, second, third = heap.allocate(8 * KIB), heap.allocate(4 * KIB), heap.allocate(KIB)
    assert [first, second, third] == [0, 8 * KIB + NOTE, 12 * KIB + 2 * NOTE]
    kept = heap.touched
    assert second is not None
    heap.free(second)
    assert heap.touched == kept  # the heap does not shrink
    assert heap.allocate(4 * KIB) == kept  # a gap of just that size has no room to align it
    assert heap.allocate(4 * KIB - ALIGNED) == second
    assert heap.used == 8 * KIB + KIB + 4 * KIB + 4 * KIB - ALIGNED + 4 * NOTE


def test_the_smallest_gap_is_taken_and_neighbours_become_one() -> None:
    heap = Heap(large=1 << 20, pad=0)
    blocks = [heap.allocate(n * KIB) for n in (9, 1, 5, 1, 6, 1)]
    for i in (0, 2, 4):
        heap.free(blocks[i])  # type: ignore[arg-type]
    assert heap.allocate(5 * KIB) == blocks[4]
    heap.free(blocks[1])  # type: ignore[arg-type]
    assert heap.allocate(14 * KIB) == blocks[0]  # 9, 1 and 5 together


def test_large_blocks_come_from_the_system_unless_they_fit() -> None:
    heap = Heap(large=64 * KIB, pad=256 * KIB)
    assert heap.allocate(64 * KIB) is None
    assert heap.touched == 0
    small = heap.allocate(KIB)  # which extends the heap by more than it needs
    assert small == 0
    assert heap.allocate(64 * KIB) == KIB + NOTE
    assert heap.allocate(400 * KIB) is None


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 6)), max_size=80))
def test_blocks_never_overlap_and_gaps_are_whole(steps: list[tuple[int, int]]) -> None:
    heap, live = Heap(large=4000, pad=512), dict[int, int]()
    for size, age in steps:
        if age < 3 and live:
            start = sorted(live)[age % len(live)]
            del live[start]
            heap.free(start)
        elif (start := heap.allocate(size)) is not None:  # type: ignore[assignment]
            live[start] = size + NOTE
        ranges = sorted(live.items())
        assert all(a + n <= b for (a, n), (b, _) in pairwise(ranges))
        assert all(start + size <= heap.touched for start, size in ranges)
        gaps: list[Any] = sorted(heap._starts.items())
        assert all(end < start for (_, end), (start, _) in pairwise(gaps))  # neighbours are one
        assert heap.used + sum(end - start for start, end in gaps) == heap._end
    for start in list(live):
        heap.free(start)
    assert heap.used == heap._end == 0
