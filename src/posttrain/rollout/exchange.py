"""Rollouts of several processes: which prompts each of them plays, and how all come to have all groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from posttrain.processes import gather, here
from posttrain.trajectory import Group, Prompt, Trajectory

ARRAYS = (
    "tokens", "action_mask", "behaviour_logp", "behaviour_logp_full", "turn", "token_reward", "experts",
)  # fmt: skip


def shares(prompts: Sequence[Prompt], world: int) -> list[list[int]]:
    """Numbers of the prompts that each of `world` processes plays, about as many each.

    Prompts of one key stay together: an engine counts them, and draws for the second what it did not for the first. So
    what a completion is does not depend on how many processes there are.
    """
    by_key: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_key.setdefault(prompt.key, []).append(i)
    found: list[list[int]] = [[] for _ in range(world)]
    for members in by_key.values():
        min(found, key=len).extend(members)
    return [sorted(share) for share in found]


def exchanged(groups: Sequence[Group], prompts: Sequence[Prompt]) -> list[Group]:
    """All groups, in the order of the prompts, from those that this process and the others played of their shares."""
    found: list[Group | None] = [None] * len(prompts)
    received = gather(*packed([t for g in groups for t in g.trajectories], [len(g) for g in groups]))
    for numbers, (arrays, facts) in zip(shares(prompts, here().world), received, strict=True):
        members = iter(unpacked(arrays, facts))
        for i, size in zip(numbers, facts["sizes"], strict=True):
            found[i] = Group([next(members) for _ in range(size)], prompts[i])
    return [group for group in found if group is not None]


def packed(trajectories: Sequence[Trajectory], sizes: list[int]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Unscored trajectories as a few long arrays; the length of each, None where a trajectory has none."""
    arrays: dict[str, Tensor] = {}
    lengths: dict[str, list[int | None]] = {}
    for name in ARRAYS:
        parts = [getattr(t, name) for t in trajectories]
        lengths[name] = [None if part is None else len(part) for part in parts]
        known = [part for part in parts if part is not None]
        if known:
            arrays[name] = torch.cat(known)
    facts = {
        "sizes": sizes, "lengths": lengths, "finish": [t.finish for t in trajectories],
        "text": [t.text for t in trajectories],
    }  # fmt: skip
    return arrays, facts


def unpacked(arrays: dict[str, Tensor], facts: dict[str, Any]) -> list[Trajectory]:
    """The trajectories that `packed` made arrays of."""
    columns: dict[str, list[Tensor | None]] = {}
    for name in ARRAYS:
        lengths = facts["lengths"][name]
        pieces = iter(arrays[name].split([n for n in lengths if n is not None]) if name in arrays else ())
        columns[name] = [None if n is None else next(pieces).clone() for n in lengths]
    made = []
    for i, (finish, text) in enumerate(zip(facts["finish"], facts["text"], strict=True)):
        values: dict[str, Any] = {name: column[i] for name, column in columns.items()}
        made.append(Trajectory(**values, finish=finish, text=text))
    return made
