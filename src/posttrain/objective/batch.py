"""Flat, unpadded per-token arrays over several trajectories: what the objective computes with.

Notation: `M` action tokens (those the policy chose or imitates), `S` sequences, `G` groups. Every per-token array is
`[M]`, in the order of the sequences; `sequence[m]` says whose token it is. There is no padding to mask anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from posttrain.trajectory import Group

SOURCES = ("policy", "expert", "teacher", "replay")
LABELS = {"none": 0, "chosen": 1, "rejected": -1}


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts over the whole optimizer step, whatever micro-batches it was split into: what losses are divided by."""

    tokens: int
    sequences: int
    groups: int


@dataclass(slots=True)
class Batch:
    """Trajectories as flat arrays.

    Per token `[M]`: target (int64 token id), place (int64, its index in the sequence), sequence (int64), turn (int64),
    behaviour_logp and behaviour_logp_full (fp32, NaN where the sampler is unknown), token_reward (fp32), and what the
    training loop adds: old_logp, reference_logp, value (fp32), advantage, returns.
    Per sequence `[S]`: reward (fp32), rewards (by component), group (int64), label (+1 chosen, -1 rejected, 0),
    source (index into SOURCES), truncated (bool), weight (fp32).
    """

    tokens: list[Tensor]
    target: Tensor
    place: Tensor
    sequence: Tensor
    turn: Tensor
    behaviour_logp: Tensor
    behaviour_logp_full: Tensor
    token_reward: Tensor
    reward: Tensor
    rewards: dict[str, Tensor]
    group: Tensor
    label: Tensor
    source: Tensor
    truncated: Tensor
    weight: Tensor
    old_logp: Tensor | None = None
    reference_logp: Tensor | None = None
    value: Tensor | None = None
    advantage: Tensor | None = None
    returns: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Batch:
        """Flatten groups; every trajectory must hold at least one action token."""
        members = [(g, t) for g, group in enumerate(groups) for t in group.trajectories]
        if not members:
            raise ValueError("a batch needs at least one trajectory")
        places = [t.action_mask.nonzero()[:, 0] for _, t in members]
        if any(len(p) == 0 for p in places):
            raise ValueError("a trajectory without a single action token cannot be trained on")
        sizes = torch.tensor([len(p) for p in places])
        unknown = torch.full((1,), float("nan"))

        def flat(name: str, default: Tensor) -> Tensor:
            return torch.cat(
                [
                    v[p] if (v := getattr(t, name)) is not None else default.expand(len(p))
                    for (_, t), p in zip(members, places, strict=True)
                ]
            )

        names = sorted({name for _, t in members for name in t.rewards})
        return cls(
            tokens=[t.tokens for _, t in members],
            target=torch.cat([t.tokens[p] for (_, t), p in zip(members, places, strict=True)]),
            place=torch.cat(places),
            sequence=torch.repeat_interleave(torch.arange(len(members)), sizes),
            turn=flat("turn", torch.zeros(1, dtype=torch.int64)),
            behaviour_logp=flat("behaviour_logp", unknown),
            behaviour_logp_full=flat("behaviour_logp_full", unknown),
            token_reward=flat("token_reward", torch.zeros(1)),
            reward=torch.tensor([t.reward for _, t in members], dtype=torch.float32),
            rewards={n: torch.tensor([t.rewards.get(n, float("nan")) for _, t in members]) for n in names},
            group=torch.tensor([g for g, _ in members]),
            label=torch.tensor([LABELS[t.label] for _, t in members]),
            source=torch.tensor([SOURCES.index(t.source) for _, t in members]),
            truncated=torch.tensor([t.finish == "length" for _, t in members]),
            weight=torch.tensor([t.weight for _, t in members], dtype=torch.float32),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Tensor:
        """`[S]` number of action tokens of each sequence."""
        return torch.bincount(self.sequence, minlength=len(self))

    @property
    def groups(self) -> int:
        return int(self.group.unique().numel())

    @property
    def totals(self) -> Totals:
        return Totals(tokens=self.target.numel(), sequences=len(self), groups=self.groups)

    def sum(self, values: Tensor) -> Tensor:
        """Sum a per-token array over each sequence: `[M]` to `[S]`, differentiable."""
        return values.new_zeros(len(self)).index_add(0, self.sequence.to(values.device), values)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of a per-token array over each sequence: `[M]` to `[S]`, differentiable."""
        return self.sum(values) / self.lengths.to(values)

    def spread(self, values: Tensor) -> Tensor:
        """Give every token its sequence's value: `[S]` to `[M]`."""
        return values[self.sequence.to(values.device)]

    def to(self, device: torch.device) -> Batch:
        """The same with its arrays on a device (token lists stay on the CPU, where rows are packed)."""
        if device.type == "cpu":
            return self
        moved: dict[str, object] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                moved[f.name] = value.to(device)
            elif isinstance(value, dict):
                moved[f.name] = {n: v.to(device) for n, v in value.items()}
        return replace(self, **moved)  # type: ignore[arg-type]

    def select(self, sequences: Tensor) -> Batch:
        """The batch of some of the sequences (`[s]` int64, in that order); group numbers are kept."""
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), self.lengths.cumsum(0)])
        chosen = [torch.arange(int(starts[s]), int(starts[s + 1])) for s in sequences.tolist()]
        index = torch.cat(chosen)
        taken: dict[str, object] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("tokens", "sequence", "rewards", "extras") or value is None:
                continue
            taken[f.name] = value[sequences if f.name in PER_SEQUENCE else index]
        return replace(
            self,
            tokens=[self.tokens[s] for s in sequences.tolist()],
            sequence=torch.repeat_interleave(torch.arange(len(chosen)), torch.tensor([len(c) for c in chosen])),
            rewards={n: v[sequences] for n, v in self.rewards.items()},
            extras={n: v[index] for n, v in self.extras.items()},
            **taken,  # type: ignore[arg-type]
        )

    def split(self, budget: int, *, keep_groups: bool) -> list[Batch]:
        """Micro-batches of at most `budget` model tokens each; see `partition`."""
        return [self.select(sequences) for sequences in self.partition(budget, keep_groups=keep_groups)]

    def partition(self, budget: int, *, keep_groups: bool) -> list[Tensor]:
        """Sequence numbers of each micro-batch of at most `budget` model tokens (one unit may exceed it).

        A unit is a group, so that its prompt is computed once, or with `keep_groups` False a piece of a group that
        alone exceeds the budget; preferences need both of a pair. Units are taken longest first, so that a micro-batch
        holds similar lengths.
        """
        length = [len(t) for t in self.tokens]
        first = self.place[self.lengths.cumsum(0) - self.lengths].tolist()

        def cost(unit: list[int]) -> int:
            shared = min(first[s] for s in unit) if len(unit) > 1 else 0
            return sum(length[s] - shared for s in unit) + shared

        units = [(self.group == g).nonzero()[:, 0].tolist() for g in self.group.unique()]
        if not keep_groups:
            units = [part for unit in units for part in _parts(unit, budget, cost)]
        units.sort(key=lambda unit: -max(length[s] for s in unit))
        batches: list[list[int]] = []
        room = 0
        for unit in units:
            if not batches or cost(unit) > room:
                batches.append([])
                room = budget
            batches[-1] += unit
            room -= cost(unit)
        return [torch.tensor(b) for b in batches]


PER_SEQUENCE = frozenset({"reward", "group", "label", "source", "truncated", "weight"})


def _parts(unit: list[int], budget: int, cost: Callable[[list[int]], int]) -> list[list[int]]:
    """Cut a group that exceeds the budget into pieces that do not (a single sequence still may)."""
    parts: list[list[int]] = []
    for s in unit:
        if parts and cost([*parts[-1], s]) <= budget:
            parts[-1].append(s)
        else:
            parts.append([s])
    return parts
