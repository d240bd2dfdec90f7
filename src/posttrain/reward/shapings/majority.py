r"""The majority answer of a group as its label: learning from rewards without any.

.. math:: \hat y(x) = \arg\max_a \#\{i : a_i = a\},\qquad r_i = 1[\,a_i \equiv \hat y(x)\,]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from posttrain.reward.extract import extract_answer, find_answer
from posttrain.reward.verifiers import MathVerify
from posttrain.rollout.context import StepContext
from posttrain.trajectory import Group, PosttrainError, Prompt

MISSING = "None"  # what a completion without an answer votes for, where it may


@dataclass(frozen=True)
class Equivalent:
    """Whether two answers are the same: as text, or mathematically ("0.5" and "1/2"), by `math_verify`."""

    grade: MathVerify = field(default_factory=MathVerify)

    def __call__(self, answer: str, other: str) -> bool:
        if answer == other:
            return True
        try:
            return bool(self.grade(rf"\boxed{{{answer}}}", Prompt(torch.empty(0, dtype=torch.int64), answer=other)))
        except PosttrainError:  # prose, which math-verify does not read
            return False


@dataclass(frozen=True)
class MajorityVote:
    """A completion's reward is 1 where its answer is equivalent to its group's most frequent one, else 0 (MM-UPT, 2025,
    arXiv 2505.22453, card 019; on text the same as TTRL). Of equally frequent answers the first one seen wins.

    The task's own reward decides nothing: it is taken off the trajectories, so that no label reaches the objective, and
    only its mean and how often the vote is right are reported (`label_reward`, `vote_accuracy`).

    answer: what a completion answers: what it `marked` (a box, a tag, "Answer:"), or the whole `text` where nothing
        is marked. guard: completions without an answer do not vote, and where there is none at all every reward is 0;
        without it they vote for "None" together. same: whether two answers are equivalent; they vote as texts.
    """

    answer: Literal["marked", "text"] = "marked"
    guard: bool = True
    same: Callable[[str, str], bool] = field(default_factory=Equivalent)

    def __call__(self, groups: Sequence[Group], context: StepContext) -> None:
        shares, agreed = [], []
        labels = [t.reward for group in groups for t in group.trajectories]
        for group in groups:
            votes = self.votes([t.text for t in group.trajectories])
            winner = majority(votes)
            shares.append(votes.count(winner) / len(votes) if winner is not None else 0.0)
            agreed.append(group.trajectories[votes.index(winner)].reward if winner is not None else 0.0)
            for trajectory, reward in zip(group.trajectories, self.rewards(votes), strict=True):
                trajectory.reward, trajectory.rewards = reward, {"majority": reward}
        context.metrics |= {
            "majority_rate": sum(shares) / len(shares),
            "vote_accuracy": sum(agreed) / len(agreed),
            "label_reward": sum(labels) / len(labels),
        }

    def votes(self, texts: Sequence[str]) -> list[str | None]:
        """The answer of each completion; None for those that do not vote."""
        found = [find_answer(text) if self.answer == "marked" else extract_answer(text) for text in texts]
        return [answer or (None if self.guard else MISSING) for answer in found]

    def rewards(self, votes: Sequence[str | None]) -> list[float]:
        """1 for each vote that is equivalent to the majority's, else 0."""
        winner = majority(votes)
        equal = {a: winner is not None and self.same(a, winner) for a in set(votes) if a is not None}
        return [float(a is not None and equal[a]) for a in votes]


def majority(votes: Sequence[str | None]) -> str | None:
    """The most frequent answer, the first seen of equals; None where nobody votes."""
    cast = Counter(a for a in votes if a is not None)
    return cast.most_common(1)[0][0] if cast else None
