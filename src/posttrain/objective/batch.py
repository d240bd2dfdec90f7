"""Flat, unpadded per-token arrays over several trajectories: what the objective computes with.

Notation: `M` action tokens (those the policy chose or imitates), `S` sequences, `G` groups. Every per-token array is
`[M]`, in the order of the sequences; `sequence[m]` says whose token it is. There is no padding to mask anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from posttrain.trajectory import SOURCES, Group

LABELS = {"none": 0, "chosen": 1, "rejected": -1}


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts over the whole optimizer step, whatever micro-batches it was split into: what losses are divided by.

    whole: the counts of all sequences, where these are of some only (a term of a mixture).
    """

    tokens: int
    sequences: int
    groups: int
    whole: Totals | None = None
    by_source: dict[str, tuple[int, int, frozenset[int]]] = field(default_factory=dict, compare=False, repr=False)

    def of_sources(self, sources: Sequence[str]) -> Totals:
        """Counts of the step's sequences of some sources alone."""
        found = [self.by_source[s] for s in sources if s in self.by_source]
        groups = frozenset[int]().union(*(g for _, _, g in found))
        return Totals(sum(t for t, _, _ in found), sum(s for _, s, _ in found), len(groups), whole=self)

    @property
    def step_groups(self) -> int:
        """Groups (prompts) of the whole step."""
        return self.groups if self.whole is None else self.whole.groups


@dataclass(slots=True)
class Batch:
    """Trajectories as flat arrays.

    Per token `[M]`: target (int64 token id), place (int64, its index in the sequence), sequence (int64), turn (int64),
    behaviour_logp and behaviour_logp_full (fp32, NaN where the sampler is unknown), token_reward (fp32), token_source
    (int64, index into SOURCES of who wrote it), and what the training loop adds: old_logp, reference_logp,
    teacher_logp, value (fp32), advantage, returns.
    Per sequence `[S]`: reward (fp32), rewards (by component), facts (by name; NaN where a sequence has none), group
    (int64), label (+1 chosen, -1 rejected, 0), source (index into SOURCES), truncated (bool), weight (fp32), experts
    (those to replay, `[inputs, layers, k]` int16, empty where unknown; None: there is nothing to replay).
    step, total: the optimizer step (from 0) and how many the stage has, for parts that follow a schedule.
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
    teacher_logp: Tensor | None = None
    advantage: Tensor | None = None
    returns: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Tensor] = field(default_factory=dict)
    token_source: Tensor | None = None
    experts: list[Tensor] | None = None
    step: int = 0
    total: int = 1

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
        facts = sorted({name for _, t in members for name in t.facts})
        sources = torch.tensor([SOURCES.index(t.source) for _, t in members])
        written = [
            p.new_full((len(p),), int(s)) if t.token_source is None else t.token_source[p]
            for (_, t), p, s in zip(members, places, sources, strict=True)
        ]
        nowhere = torch.empty(0, dtype=torch.int16)
        routed = any(t.experts is not None for _, t in members)
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
            source=sources,
            truncated=torch.tensor([t.finish == "length" for _, t in members]),
            weight=torch.tensor([t.weight for _, t in members], dtype=torch.float32),
            facts={n: torch.tensor([t.facts.get(n, float("nan")) for _, t in members]) for n in facts},
            token_source=torch.cat(written),
            experts=[nowhere if t.experts is None else t.experts for _, t in members] if routed else None,
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
        by_source = {}
        for number in self.source.unique().tolist():
            members = self.source == number
            counts = int(self.lengths[members].sum()), int(members.sum()), frozenset(self.group[members].tolist())
            by_source[str(SOURCES[number])] = counts
        return Totals(self.target.numel(), len(self), self.groups, by_source=by_source)

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
        index = self.tokens_of(sequences)
        taken: dict[str, object] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "sequence" and isinstance(value, Tensor):
                taken[f.name] = value[sequences if f.name in PER_SEQUENCE else index]
        return replace(
            self,
            tokens=[self.tokens[s] for s in sequences.tolist()],
            experts=None if self.experts is None else [self.experts[s] for s in sequences.tolist()],
            sequence=torch.repeat_interleave(torch.arange(len(sequences)), self.lengths[sequences]),
            rewards={n: v[sequences] for n, v in self.rewards.items()},
            extras={n: v[index] for n, v in self.extras.items()},
            facts={n: v[sequences] for n, v in self.facts.items()},
            **taken,  # type: ignore[arg-type]
        )

    def tokens_of(self, sequences: Tensor) -> Tensor:
        """Places in the per-token arrays of the tokens of some sequences, in that order."""
        lengths = self.lengths
        size = lengths[sequences]
        begins = (lengths.cumsum(0) - lengths)[sequences]
        inside = torch.arange(int(size.sum())) - torch.repeat_interleave(size.cumsum(0) - size, size)
        return torch.repeat_interleave(begins, size) + inside

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

        members: dict[int, list[int]] = {}
        for s, g in enumerate(self.group.tolist()):
            members.setdefault(g, []).append(s)
        units = [members[g] for g in sorted(members)]
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
