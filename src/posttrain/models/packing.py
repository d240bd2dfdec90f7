"""Packed layout: ragged sequences in one row, without padding, prompts shared by a group computed once.

A *segment* is a run of packed tokens: a whole sequence, a prompt that several completions share, or such a completion.
A segment attends to itself causally and, where it has one, to its whole prefix segment; never to anything else.
Linear layers, norms and embeddings see one row of real tokens; only attention gathers segments into small rectangles
(*buckets* of similar length).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.objective.batch import Batch

BUCKET_RATIO = 0.7  # a segment joins a bucket if its keys are at least this share of the longest there
SCORES_PER_BUCKET = 1 << 20  # query x key pairs of one head held at a time
BLOCK = 128  # queries of a block at least, where a bucket is cut into several
EVEN = 32  # keys, from BLOCK of them on, are padded to a multiple of it: some products are a third slower otherwise


@dataclass(slots=True)
class Segment:
    start: int
    length: int
    prefix: int = -1  # index of the segment it continues
    offset: int = 0  # position of its first token


class Block(NamedTuple):
    """Some queries of each row of a bucket, with the keys that any of them sees: query `[B, q]` and key `[B, k]` int64
    packed indices, -1 where padded; mask `[B, 1, q, k]` bool, for padded queries true somewhere, for padded keys false.
    """

    query: Tensor
    key: Tensor
    mask: Tensor


@dataclass(slots=True)
class Bucket:
    """Segments of similar length as one rectangle.

    query: `[B, Q]` int64 packed index of each query, 0 where padded; position: `[B, Q]` its position likewise.
    key: `[B, K]` int64 packed index of the key at each position of a sequence, 0 where padded.
    mask: `[B, 1, Q, K]` bool, True where a query may look; query_rows: flat indices into `[B * Q]` that are real, in
    the order of `packed`, their packed indices. before: the most keys that a row has before its first query's own.
    """

    query: Tensor
    position: Tensor
    key: Tensor
    mask: Tensor
    query_rows: Tensor
    packed: Tensor
    before: int
    windowed: dict[int, Tensor] = field(default_factory=dict)
    cut: dict[int | None, list[Block]] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """No segment continues another, so that a query sees all of its row up to itself."""
        return self.before == 0

    def within(self, window: int | None) -> Tensor:
        """The mask of a layer that looks back over `window` tokens, the query's own included; made once a window."""
        keys = self.key.shape[1]
        if not window or window >= keys:
            return self.mask
        if window not in self.windowed:
            distance = self.position[:, :, None] - torch.arange(keys, device=self.key.device)
            self.windowed[window] = self.mask & (distance < window)[:, None]
        return self.windowed[window]

    def blocks(self, window: int | None) -> list[Block]:
        """All queries with their keys for a layer with that window, made once a window.

        The first queries see the first keys alone: in blocks they spare the products of others, which masks would
        hide. Shapes and `before` decide where a block begins, no tensor's numbers, so that those of `meta` do.
        """
        mask = self.within(window)
        width = None if mask is self.mask else window
        if width not in self.cut:
            query = torch.full_like(self.query, -1)
            query.view(-1)[self.query_rows] = self.packed
            place = torch.arange(self.key.shape[1], device=self.key.device)
            key = self.key.masked_fill(place > self.position.amax(1, keepdim=True), -1)
            queries = self.query.shape[1]
            step = -(-queries // (max(1, queries // BLOCK) * EVEN)) * EVEN
            self.cut[width] = [
                _block(query[:, first : first + step], key, mask[:, :, first : first + step], self.before + first)
                for first in range(0, queries, step)
            ]
        return self.cut[width]

    def to(self, device: torch.device) -> Bucket:
        return Bucket(
            self.query.to(device),
            self.position.to(device),
            self.key.to(device),
            self.mask.to(device),
            self.query_rows.to(device),
            self.packed.to(device),
            self.before,
        )


def _block(query: Tensor, key: Tensor, mask: Tensor, before: int) -> Block:
    """Those queries with the keys that they see, given how many the first of them has before its own at most."""
    keys = min(before + query.shape[1], key.shape[1])
    more = -keys % EVEN if keys >= BLOCK else 0
    return Block(
        query.contiguous(),
        F.pad(key[:, :keys], (0, more), value=-1).contiguous(),
        F.pad(mask[..., :keys], (0, more), value=False).contiguous(),
    )


@dataclass(slots=True)
class Layout:
    """tokens, positions: `[N]` int64; source: `[M]` packed index of the hidden state that predicts each target.

    spans: for each sequence of the batch where its inputs lie, as (start, length) of its shared prompt and of its own.
    """

    tokens: Tensor
    positions: Tensor
    segments: list[Segment]
    buckets: list[Bucket]
    source: Tensor
    spans: list[tuple[int, int, int, int]] = field(default_factory=list)

    def inputs(self) -> list[Tensor]:
        """For each sequence the packed index of each of its inputs, in their order: `[length]` int64."""
        return [
            torch.cat([torch.arange(shared, shared + size), torch.arange(own, own + length)])
            for shared, size, own, length in self.spans
        ]

    def to(self, device: torch.device) -> Layout:
        if device.type == "cpu":
            return self
        moved = [b.to(device) for b in self.buckets]
        return Layout(
            self.tokens.to(device),
            self.positions.to(device),
            self.segments,
            moved,
            self.source.to(device),
            self.spans,
        )


def pack(batch: Batch, *, share_prompts: bool = True) -> Layout:
    """Lay a batch out. The last action of a sequence is only predicted, so it is no input."""
    sequence, place = batch.sequence.cpu(), batch.place.cpu()
    first = torch.full((len(batch),), 1 << 62).scatter_reduce(0, sequence, place, "amin").tolist()
    last = torch.zeros(len(batch), dtype=torch.int64).scatter_reduce(0, sequence, place, "amax").tolist()
    members: dict[int, list[int]] = {}
    for s, g in enumerate(batch.group.tolist()):
        members.setdefault(g, []).append(s)

    builder = _Builder()
    origin: list[tuple[int, int, int]] = [(0, 0, 0)] * len(batch)  # packed start, its position, packed prefix start
    for sequences in members.values():
        shared = _common_prompt([batch.tokens[s] for s in sequences], min(first[s] for s in sequences))
        if not share_prompts or len(sequences) == 1 or shared == 0:
            for s in sequences:
                start = builder.add(batch.tokens[s][: last[s]])
                origin[s] = (start, 0, start)
            continue
        prefix_start = builder.add(batch.tokens[sequences[0]][:shared])
        prefix = len(builder.segments) - 1
        for s in sequences:
            start = builder.add(batch.tokens[s][shared : last[s]], prefix=prefix, offset=shared)
            origin[s] = (start, shared, prefix_start)

    own, offset, prefix_starts = torch.tensor(origin).T
    before = place - 1  # the hidden state one place earlier predicts a token
    here = before - offset[sequence]
    source = torch.where(here >= 0, own[sequence] + here, prefix_starts[sequence] + before)
    spans = [(shared, size, start, last[s] - size) for s, (start, size, shared) in enumerate(origin)]
    return builder.layout(source, spans)


def pack_prompts(prompts: list[Tensor]) -> Layout:
    """Lay out whole prompts (for prefill); `source` is the last token of each."""
    builder = _Builder()
    starts = [builder.add(p) for p in prompts]
    return builder.layout(torch.tensor([s + len(p) - 1 for s, p in zip(starts, prompts, strict=True)]))


def _common_prompt(sequences: list[Tensor], limit: int) -> int:
    """Length of the prefix that all sequences share, at most `limit`."""
    reference = sequences[0][:limit]
    for other in sequences[1:]:
        equal = reference[: len(other)] == other[: len(reference)]
        length = len(equal) if bool(equal.all()) else int((~equal).nonzero()[0])
        reference = reference[:length]
    return len(reference)


class _Builder:
    def __init__(self) -> None:
        self.tokens: list[Tensor] = []
        self.segments: list[Segment] = []
        self.used = 0

    def add(self, tokens: Tensor, prefix: int = -1, offset: int = 0) -> int:
        start = self.used
        if len(tokens):
            self.segments.append(Segment(start, len(tokens), prefix, offset))
            self.tokens.append(tokens)
            self.used += len(tokens)
        return start

    def layout(self, source: Tensor, spans: Sequence[tuple[int, int, int, int]] = ()) -> Layout:
        positions = torch.cat([torch.arange(s.offset, s.offset + s.length) for s in self.segments])
        return Layout(torch.cat(self.tokens), positions, self.segments, self._buckets(), source, list(spans))

    def _buckets(self) -> list[Bucket]:
        order = sorted(self.segments, key=lambda s: (s.prefix < 0, -(s.offset + s.length), -s.length))
        buckets: list[list[Segment]] = []
        for segment in order:
            keys = segment.offset + segment.length
            head = buckets[-1][0] if buckets else None
            fits = (
                head is not None
                and (head.prefix < 0) == (segment.prefix < 0)
                and keys >= BUCKET_RATIO * (head.offset + head.length)
                and (len(buckets[-1]) + 1)
                * max(s.length for s in (segment, *buckets[-1]))
                * (head.offset + head.length)
                <= SCORES_PER_BUCKET
            )
            if fits:
                buckets[-1].append(segment)
            else:
                buckets.append([segment])
        return [self._bucket(b) for b in buckets]

    def _bucket(self, segments: list[Segment]) -> Bucket:
        width = max(s.length for s in segments)
        keys = max(s.offset + s.length for s in segments)
        query, position = (torch.zeros(len(segments), width, dtype=torch.int64) for _ in range(2))
        key = torch.zeros(len(segments), keys, dtype=torch.int64)
        real_query = torch.zeros(len(segments), width, dtype=torch.bool)
        for row, s in enumerate(segments):
            own = torch.arange(s.start, s.start + s.length)
            query[row, : s.length], real_query[row, : s.length] = own, True
            position[row, : s.length] = torch.arange(s.offset, s.offset + s.length)
            if s.prefix >= 0:
                prefix = self.segments[s.prefix]
                key[row, : s.offset] = torch.arange(prefix.start, prefix.start + prefix.length)
            key[row, s.offset : s.offset + s.length] = own
        # a padded query stands at position 0 and looks there, so that its softmax is finite
        mask = position[:, :, None] >= torch.arange(keys)
        rows = real_query.flatten().nonzero()[:, 0]
        before = max(s.offset for s in segments)
        return Bucket(query, position, key, mask[:, None], rows, query.flatten()[rows], before)
