"""Prompts that evolve with the policy: of those on which its completions differ most, new ones are made.

Reference: Scalable Reinforcement Post-Training Beyond Static Human Prompts: Evolving Alignment via Asymmetric
Self-Play, 2024, arXiv 2411.00062 (card 021).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.data.prompt_buffer import INFORMATIVENESS, PromptBuffer
from posttrain.rollout.context import StepContext
from posttrain.rollout.evolvers import Evolver, InstructionEvolver
from posttrain.trajectory import Group, PosttrainError, Prompt


@dataclass
class Evolving:
    """A share of every step's prompts is evolved from those that were most informative when they were last visited.

    The share is 0 until `mixing` (of the stage's steps), then rises in a straight line to `share` at `autonomous`; the
    others are the sampler's. How informative a prompt is, is measured on the completions of its own visits.

    Args:
        evolver: makes new prompts of old ones. offspring: how many of each that is drawn.
        informativeness: `gap` (best minus worst reward), `mean-gap`, `duel`, `variance`, `uniform` or `inverse`.
        capacity: prompts remembered.
    """

    evolver: Evolver = field(default_factory=InstructionEvolver)
    informativeness: str = "gap"
    share: float = 0.8
    mixing: float = 0.1
    autonomous: float = 0.5
    offspring: int = 4
    capacity: int = 10_000
    buffer: PromptBuffer = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.informativeness not in INFORMATIVENESS:
            raise PosttrainError(
                f"informativeness is {self.informativeness!r}; expected one of {', '.join(INFORMATIVENESS)}"
            )
        if not (0 <= self.share <= 1 and 0 <= self.mixing <= self.autonomous <= 1 and self.offspring >= 1):
            raise PosttrainError(
                f"evolving: share={self.share}, mixing={self.mixing}, autonomous={self.autonomous}, "
                f"offspring={self.offspring}; expected shares with mixing <= autonomous, and offspring from 1"
            )
        self.buffer = PromptBuffer(self.capacity)

    def __call__(self, prompts: Sequence[Prompt], context: StepContext) -> list[Group]:
        evolved = self._evolved(round(self.share_at(context.step, context.total) * len(prompts)), context)
        chosen = [(prompt, 0) for prompt in prompts[: len(prompts) - len(evolved)]] + evolved
        groups = context.draw([prompt for prompt, _ in chosen])
        measure, found = INFORMATIVENESS[self.informativeness], []
        for group, (prompt, generation) in zip(groups, chosen, strict=True):
            found.append(measure([t.reward for t in group.trajectories]))
            self.buffer.visit(prompt, found[-1], generation)
        context.metrics |= {
            "evolved": len(evolved) / len(chosen),
            "generation": sum(held.generation for held in self.buffer.held.values()) / len(self.buffer),
            "informativeness": sum(found) / len(found),
        }
        return groups

    def share_at(self, step: int, total: int) -> float:
        """Which share of the prompts is to be evolved at a step."""
        done, begin, end = step / total, self.mixing, self.autonomous
        if done < begin:
            return 0.0
        return self.share if done >= end else self.share * (done - begin) / (end - begin)

    def _evolved(self, wanted: int, context: StepContext) -> list[tuple[Prompt, int]]:
        """At most `wanted` new prompts with their generations; none that is known already."""
        parents = self.buffer.draw(-(-wanted // self.offspring), context.random("parents"))
        asked = [parent for parent in parents for _ in range(self.offspring)][:wanted]
        if not asked:
            return []
        found: dict[str, tuple[Prompt, int]] = {}
        for parent, made in zip(asked, self.evolver([p.prompt for p in asked], context), strict=True):
            if made is not None and made.question not in self.buffer:
                found.setdefault(made.question, (made, parent.generation + 1))
        return list(found.values())

    def state_dict(self) -> dict[str, Any]:
        return self.buffer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state)
