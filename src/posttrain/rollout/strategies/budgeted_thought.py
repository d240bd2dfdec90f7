r"""Predicting chosen tokens of a document after a thought of a given length, and imitating all others (RMT).

Which tokens are chosen follows a curriculum over their entropy under the stage's first policy; how long to think, a
budget that shrinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from posttrain.models.causal import CausalPolicy
from posttrain.models.scoring import action_statistics
from posttrain.rollout.context import StepContext
from posttrain.rollout.strategies.thought import closed, encoded
from posttrain.rollout.strategy import demonstration_of
from posttrain.trajectory import Group, Prompt, Trajectory

Shares = tuple[float, float, float]


def length_reward(tokens: int, budget: int, most: float = 1.0) -> float:
    """A triangle over the thought's length: 0 at none, `most` at the budget, 0 again at twice the budget and beyond."""
    return most * max(0.0, min(tokens / budget, 2 - tokens / budget))


@dataclass(frozen=True)
class Curriculum:
    """Shares of easy, medium and hard tokens: `early` until a share `begin` of the stage, `late` from `end` on, and on
    a straight line between.
    """

    early: Shares = (0.7, 0.2, 0.1)
    late: Shares = (0.1, 0.3, 0.6)
    begin: float = 0.3
    end: float = 0.7

    def __call__(self, step: int, total: int) -> Shares:
        done = (step / max(1, total) - self.begin) / (self.end - self.begin)
        part = min(1.0, max(0.0, done))
        easy, medium, hard = ((1 - part) * a + part * b for a, b in zip(self.early, self.late, strict=True))
        return easy, medium, hard


@dataclass(frozen=True)
class Budget:
    """Tokens to think: max(floor, start * decay ** (step / total)), rounded down."""

    start: int = 800
    decay: float = 0.2
    floor: int = 1

    def __call__(self, step: int, total: int) -> int:
        return max(self.floor, int(self.start * self.decay ** (step / max(1, total)) + 1e-9))


@dataclass
class ThinkWithinBudget:
    """Groups of thoughts with a prediction behind them, for `chosen` tokens of each document's solution; and the
    document itself, as an expert's, whose other tokens are imitated.

    instruction: text before the thought, in which {budget} stands for the number of tokens. weight: of the length
    reward (the rest is whether the prediction is the document's token). curriculum None chooses uniformly.

    The first step's documents set the entropies at which tiers part (terciles), part of the state. Of a tier that a
    document has no token of, the nearest is taken. Leaves the components `right` and `length`.
    """

    open: str = "<think>"
    close: str = "</think>"
    instruction: str = "Think in {budget} tokens."
    budget: Budget = field(default_factory=Budget)
    curriculum: Curriculum | None = field(default_factory=Curriculum)
    weight: float = 0.2
    chosen: int = 1
    demonstrations: ClassVar[bool] = True
    reference: ClassVar[bool] = True
    _parts: list[float] = field(default_factory=list, repr=False, compare=False)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": self._parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._parts = [float(x) for x in state["parts"]]

    def __call__(self, prompts: Sequence[Prompt], context: StepContext) -> list[Group]:
        policy = context.required_policy()
        documents = [demonstration_of(prompt) for prompt in prompts]
        places = self.places(documents, context)
        budget = self.budget(context.step, context.total)
        marker = encoded(self.instruction.format(budget=budget) + self.open, policy)
        asked, goals = [], []
        for prompt, document, own in zip(prompts, documents, places, strict=True):
            for place in own:
                asked.append(replace(prompt, tokens=torch.cat([document.tokens[:place], marker])))
                goals.append(int(document.tokens[place]))
        sampling = replace(
            context.sampling, stop=(self.close,), max_tokens=min(context.sampling.max_tokens, 2 * budget)
        )
        thoughts = context.sample(asked, sampling=sampling)
        predicted = self._predict(thoughts, context)
        groups = [Group([], prompt) for prompt in asked]
        for group, thought, goal, after in zip(groups, thoughts, goals, predicted, strict=True):
            for trajectory, last in zip(thought.trajectories, after, strict=True):
                group.trajectories.append(self._rewarded(trajectory, last, goal, budget, policy))
        context.metrics["thought_budget"] = float(budget)
        rest = (_rest(d, own, p) for d, own, p in zip(documents, places, prompts, strict=True))
        return groups + [group for group in rest if len(group)]

    def places(self, documents: Sequence[Trajectory], context: StepContext) -> list[list[int]]:
        """Which tokens of each document are to be thought about: of its solution, its end token excepted."""
        ends = context.required_policy().end_tokens
        tiers = self._tiers(documents, context)
        random = context.random("places")
        shares = None if self.curriculum is None else self.curriculum(context.step, context.total)
        found = []
        for document, tier in zip(documents, tiers, strict=True):
            solution = document.action_mask.nonzero()[:, 0]
            left = [i for i, place in enumerate(solution.tolist()) if int(document.tokens[place]) not in ends]
            own: list[int] = []
            for _ in range(min(self.chosen, len(left))):
                if shares is None:
                    pool = left
                else:
                    wanted = int(random.choice(3, p=np.array(shares) / sum(shares)))
                    near = min(abs(int(tier[i]) - wanted) for i in left)
                    pool = [i for i in left if abs(int(tier[i]) - wanted) == near]
                place = pool[int(random.integers(len(pool)))]
                left.remove(place)
                own.append(int(solution[place]))
            found.append(sorted(own))
        return found

    def _tiers(self, documents: Sequence[Trajectory], context: StepContext) -> list[Tensor]:
        """0 easy, 1 medium, 2 hard for each token of each solution."""
        if context.reference is None:
            raise RuntimeError("tiers are by the first policy's entropy; this runs inside the training loop")
        with context.reference() as first:
            entropy = action_statistics(first, documents, context.token_budget, entropy=True)
        if not self._parts:
            self._parts = torch.cat(entropy).quantile(torch.tensor([1 / 3, 2 / 3])).tolist()
        parts = torch.tensor(self._parts)
        return [torch.bucketize(e, parts) for e in entropy]

    def _predict(self, thoughts: Sequence[Group], context: StepContext) -> list[list[Trajectory]]:
        """One token behind every thought."""
        policy = context.required_policy()
        asked = [
            replace(group.prompt, tokens=closed(t, self.close, policy))
            for group in thoughts
            if group.prompt is not None
            for t in group.trajectories
        ]
        single = replace(context.sampling, max_tokens=1)
        answers = iter(context.sample(asked, 1, sampling=single))
        return [[next(answers).trajectories[0] for _ in group.trajectories] for group in thoughts]

    def _rewarded(
        self, thought: Trajectory, last: Trajectory, goal: int, budget: int, policy: CausalPolicy
    ) -> Trajectory:
        """Thought and prediction as one trajectory; a closing marker that had to be added is no action."""
        size = last.length
        marker = len(encoded(self.close, policy)) if thought.text.endswith(self.close) else 0
        ended = int(thought.tokens[-1]) in policy.end_tokens
        kept = thought.length - int(ended)
        length = thought.actions - marker - int(ended)
        mask = torch.zeros(size, dtype=torch.bool)
        mask[:kept] = thought.action_mask[:kept]
        mask[-1] = True
        right = float(int(last.tokens[-1]) == goal)
        triangle = length_reward(max(0, length), budget)
        return Trajectory(
            last.tokens,
            mask,
            _spliced(thought.behaviour_logp, last.behaviour_logp, kept, size),
            _spliced(thought.behaviour_logp_full, last.behaviour_logp_full, kept, size),
            reward=(1 - self.weight) * right + self.weight * triangle,
            rewards={"right": right, "length": triangle},
            finish=thought.finish,
            text=thought.text + last.text,
        )


def _spliced(thought: Tensor | None, last: Tensor | None, kept: int, size: int) -> Tensor:
    assert thought is not None
    assert last is not None
    found = torch.zeros(size)
    found[:kept], found[-1] = thought[:kept], last[-1]
    return found


def _rest(document: Trajectory, chosen: Sequence[int], prompt: Prompt) -> Group:
    """The document without its chosen tokens: what plain next-token prediction trains on."""
    mask = document.action_mask.clone()
    mask[list(chosen)] = False
    if not bool(mask.any()):
        return Group([], prompt)
    return Group([Trajectory(document.tokens, mask, source="expert", reward=0.0)], prompt)
