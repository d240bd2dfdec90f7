"""What several processes do with an optimizer step: each computes some of its groups, and they add up what comes of it.

Every process knows the whole step: its rows, rewards, advantages, and the counts that the loss divides by. It computes
log-probabilities and gradients for its share of the groups alone. Gradients are added, not averaged: since what a loss
divides by is counted over the whole step, their sum is the gradient of one process, however the groups are shared out.
(A mean over processes of means over their tokens is another loss as soon as they hold different numbers of tokens.)
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from posttrain.models.sharded import is_piece, piece
from posttrain.objective.batch import Batch
from posttrain.processes import add, everyone, gather, here
from posttrain.training.checkpoint import Part, Stored
from posttrain.training.settings import Settings
from posttrain.trajectory import Group, PosttrainError

BUCKET = 1 << 25  # fp32 numbers that are added at a time: 128 MiB


@dataclass(frozen=True, slots=True)
class Piece:
    """sequences: numbers of a micro-batch's sequences, int64. counts: False where the pass is only made because weights
    that are spread are gathered by all processes together, and nothing may come of it."""

    sequences: Tensor
    counts: bool = True


def shares(batch: Batch, world: int) -> list[Tensor]:
    """Sequence numbers of each process's groups: whole groups, about as many tokens each."""
    members: dict[int, list[int]] = {}
    cost: dict[int, int] = {}
    for s, g in enumerate(batch.group.tolist()):
        members.setdefault(g, []).append(s)
        cost[g] = cost.get(g, 0) + len(batch.tokens[s])
    found: list[list[int]] = [[] for _ in range(world)]
    load = [0] * world
    for g in sorted(members, key=lambda g: (-cost[g], g)):
        lightest = load.index(min(load))
        found[lightest] += members[g]
        load[lightest] += cost[g]
    return [torch.tensor(sorted(share), dtype=torch.int64) for share in found]


def micro_batches(batch: Batch, budget: int, *, keep_groups: bool) -> list[Piece]:
    """This process's micro-batches of at most `budget` model tokens each."""
    if not here().several:
        return [Piece(sequences) for sequences in batch.partition(budget, keep_groups=keep_groups)]

    def parts(share: Tensor) -> list[Tensor]:
        inside = batch.select(share).partition(budget, keep_groups=keep_groups) if len(share) else []
        return [share[sequences] for sequences in inside]

    each = shares(batch, here().world)
    found = [Piece(sequences) for sequences in parts(each[here().rank])]
    if here().sharded:
        most = max(len(parts(share)) for share in each)
        shortest = min(range(len(batch)), key=lambda s: len(batch.tokens[s]))
        found += [Piece(torch.tensor([shortest]), counts=False)] * (most - len(found))
    return found


def add_gradients(masters: Sequence[Tensor]) -> None:
    """Make the gradients of tensors that every process has a copy of (fp32, any shape) the sum over the processes. One
    that has none in some process counts as 0 there; one that has none anywhere stays without."""
    if not here().several or not masters:
        return
    there = add(torch.tensor([int(m.grad is not None) for m in masters]))
    wanted = [m for m, count in zip(masters, there.tolist(), strict=True) if count]
    while wanted:
        bucket = [wanted.pop(0)]
        while wanted and sum(m.numel() for m in bucket) + wanted[0].numel() <= BUCKET:
            bucket.append(wanted.pop(0))
        flat = torch.cat([(torch.zeros_like(m) if m.grad is None else m.grad).flatten() for m in bucket])
        for master, part in zip(bucket, add(flat).split([m.numel() for m in bucket]), strict=True):
            master.grad = part.view_as(master)


def part_of(tensor: Tensor) -> Tensor | Part:
    """What a checkpoint keeps of a parameter: this process's rows where it is spread."""
    if not is_piece(tensor):
        return tensor.detach()
    length = tensor.shape[0]
    return Part(piece(tensor), min(here().rank * -(-length // here().world), length), tuple(tensor.shape))


def stored(tensors: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """What this process needs of a tensor in a checkpoint: the rows that it has of the parameter `like`, if any."""
    part = part_of(like)
    if isinstance(part, Tensor):
        return tensors[name]
    stop = part.start + len(part.rows)
    return tensors.rows(name, part.start, stop) if isinstance(tensors, Stored) else tensors[name][part.start : stop]


def summed(sums: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Metrics as sums and counts, added over the processes."""
    found: dict[str, tuple[float, float]] = {}
    for part in everyone({name: list(pair) for name, pair in sums.items()}):
        for name, (value, count) in part.items():
            before = found.get(name, (0.0, 0.0))
            found[name] = (before[0] + value, before[1] + count)
    return found


def score_shared(score: Callable[[Sequence[Group]], None]) -> Callable[[Sequence[Group]], None]:
    """A function that scores groups in place, each group by one process, after which all know all scores."""
    if not here().several:
        return score

    def scored(groups: Sequence[Group]) -> None:
        mine = list(groups[here().rank :: here().world])
        score(mine)
        earned = torch.tensor([t.reward for g in mine for t in g.trajectories], dtype=torch.float64)
        received = gather({"reward": earned}, [t.rewards for g in mine for t in g.trajectories])
        for rank, (totals, parts) in enumerate(received):
            members = [t for g in groups[rank :: here().world] for t in g.trajectories]
            for t, total, rewards in zip(members, totals["reward"].tolist(), parts, strict=True):
                t.reward, t.rewards = total, rewards

    return scored


def experts_of_all(batch: Batch, chosen: Mapping[int, Tensor]) -> list[Tensor]:
    """The experts of every sequence (`[inputs, layers, k]` int16) from those that the processes recorded, by number."""
    found: dict[int, Tensor] = dict(chosen)
    if here().several:
        for arrays, _ in gather({str(s): sent.contiguous() for s, sent in chosen.items()}):
            found |= {int(s): sent for s, sent in arrays.items()}
    return [found[s] for s in range(len(batch))]


def checksum(batch: Batch) -> list[int]:
    """Numbers that differ as soon as two processes hold other tokens or rewards."""
    arrays = (torch.cat(batch.tokens), batch.group, batch.reward)
    return [zlib.crc32(a.contiguous().numpy().tobytes()) for a in arrays]


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Of several processes: let what draws from the global generators (dropout, a user's reward) depend on seed, step
    and process alone, so that a resumed run draws the same. One process goes on with the states of its checkpoint."""
    if not here().several:
        return
    drawn = np.random.SeedSequence([seed % 2**64, step, rank]).generate_state(2, np.uint64)
    torch.manual_seed(int(drawn[0]) % 2**63)
    random.seed(int(drawn[1]))
    np.random.seed(int(drawn[1]) % 2**32)  # noqa: NPY002 - what other libraries draw from


def check_batch(name: str, settings: Settings, rows: int) -> None:
    """PosttrainError where a process would have nothing to do."""
    world, batch = here().world, min(settings.batch, rows)
    least = batch // settings.minibatches
    if here().several and least < world:
        what = f"batch is {settings.batch} of {rows} rows"
        what += f" in {settings.minibatches} minibatches" if settings.minibatches > 1 else ""
        raise PosttrainError(
            f"{name}: {what} and there are {world} processes, some of which would have nothing to do; a step needs "
            f"{world * settings.minibatches} rows or more: raise batch, or start fewer processes"
        )
