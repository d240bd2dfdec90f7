"""The ledger on small pieces of code whose memory is known."""

from __future__ import annotations

import torch

from posttrain.plan.heap import Heap
from posttrain.plan.ledger import Ledger


def test_it_counts_what_lives() -> None:
    ledger = Ledger("cpu")
    with ledger:
        with ledger.part("weights"):
            a = torch.ones(100)
        with ledger.phase("first") as first:
            b = a + 1
            view, same = b[:10], b.view(10, 10)
            b += 1  # in place
            assert ledger.live == {"weights": 400, "workspace": 400}
            del b, view
            assert ledger.held == 800
            del same
            assert ledger.held == 400
        with ledger.phase("second") as second:
            a * 2
    assert ledger.peak.bytes == first.bytes == second.bytes == 800
    assert ledger.peak.parts == {"weights": 400, "workspace": 400}
    del a
    assert ledger.held == 0


def test_small_blocks_stay_with_the_process_and_large_ones_do_not() -> None:
    ledger = Ledger("meta", Heap(large=2048, pad=0))
    with ledger:
        small, large = torch.empty(240, device="meta"), torch.empty(1000, device="meta")
        assert ledger.held == 976 + 4000
        del small, large
        assert ledger.held == 976
        again = torch.empty(100, device="meta")  # in the place of the freed one
        assert ledger.held == 976
        ledger.hold([again], "weights")  # which does not move it
        more = torch.empty(240, device="meta")
        assert ledger.held == 416 + 976
        assert ledger.live == {"weights": 400, "workspace": 960}
    assert ledger.peak.parts["kept"] == 16  # the heap's own note before a block
    del again, more
    assert ledger.held == 416 + 976


def test_other_devices_are_not_counted() -> None:
    with Ledger("meta") as ledger:
        torch.ones(10)
    assert ledger.peak.bytes == 0


def test_a_backward_pass_is_seen() -> None:
    ledger = Ledger("cpu")
    weight = torch.ones(50, 50, requires_grad=True)
    inputs = torch.ones(20, 50)
    with ledger:
        ledger.hold([weight], "weights")
        out = (inputs @ weight).exp().sum()  # the product goes, its exponential is kept for the backward pass
        kept = ledger.held
        out.backward()
    assert weight.grad is not None
    assert kept == 4 * (50 * 50 + 20 * 50 + 1)
    assert ledger.peak.work == 2 * 20 * 50 * 50 * 2  # the inputs need no gradient
    ledger.hold([weight.grad], "gradients")
    assert ledger.live["gradients"] == 4 * 50 * 50


def test_numbers_are_read_from_tensors_that_hold_none() -> None:
    with Ledger("meta"):
        assert bool(torch.isfinite(torch.empty(3, device="meta")).all())
        assert float(torch.empty((), device="meta")) == 1.0
