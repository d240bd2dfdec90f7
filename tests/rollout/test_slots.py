"""Key-value slots against a list of rows that are simply kept."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.models.attention import LayerState
from posttrain.rollout.slots import Slots

HEADS, KV, WIDTH = 4, 2, 3


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_rows_keep_their_own_keys_through_admission_decoding_and_compaction(data):
    """Random histories; every step attends to exactly what its row has seen, within the window."""
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    slots = Slots(4, 40)
    rows: list[dict[int, list[torch.Tensor]]] = []  # a row: keys and values [KV, tokens, WIDTH] of each layer
    for _ in range(data.draw(st.integers(1, 8))):
        free = 4 - len(rows)
        copies = data.draw(st.integers(0 if rows else 1, free)) if free else 0
        if copies:
            tokens, start = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 2))
            shape = (2, 2, KV, start + tokens + 1, WIDTH)
            whole = {n: LayerState(k, v, None) for n, (k, v) in enumerate(torch.randn(shape, generator=draw))}
            part = slice(start, start + tokens)
            assert slots.admit(whole, part, copies) == len(rows)
            rows += [{n: [s.key[:, part], s.value[:, part]] for n, s in whole.items()} for _ in range(copies)]
        assert slots.active == len(rows)
        assert slots.begin_step().tolist() == [r[0][0].shape[1] for r in rows]
        for layer in range(2):
            q = torch.randn(len(rows), HEADS, 1, WIDTH, generator=draw)
            k, v = (torch.randn(len(rows), KV, 1, WIDTH, generator=draw) for _ in range(2))
            window = data.draw(st.sampled_from([None, 1, 3, 100]))
            softcap = data.draw(st.sampled_from([None, 0.7]))
            out = slots.attend(layer, q, k, v, 0.5, window=window, softcap=softcap)
            for i, row in enumerate(rows):
                row[layer] = [torch.cat(pair, 1) for pair in zip(row[layer], (k[i], v[i]), strict=True)]
                seen = [t[:, -(window or 99) :].repeat_interleave(HEADS // KV, 0) for t in row[layer]]
                scores = (q[i] @ seen[0].transpose(-1, -2)) * 0.5
                scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                expected = (scores.softmax(-1) @ seen[1]).transpose(0, 1)
                torch.testing.assert_close(out[i], expected, atol=1e-5, rtol=1e-5)
        keep = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1))))
        kept = torch.tensor(keep, dtype=torch.int64)
        order = Slots.order(kept).tolist()
        assert sorted(order) == keep
        slots.compact(kept)
        rows = [rows[i] for i in order]


def test_compaction_moves_as_few_rows_as_there_are_gaps():
    assert Slots.order(torch.tensor([0, 2, 3, 5])).tolist() == [0, 5, 2, 3]
    assert Slots.order(torch.tensor([4])).tolist() == [4]
    assert Slots.order(torch.tensor([], dtype=torch.int64)).tolist() == []
    assert Slots.order(torch.tensor([0, 1])).tolist() == [0, 1]
