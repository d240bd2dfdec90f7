"""Rollouts drawn ahead of their step, so that sampling and training go on at the same time.

With staleness s the completions of step t are drawn with the weights after max(0, t - s) updates: exactly that old, in
every run, however long anything takes. The objective weighs them by its denominator, for which the policy that drew
them is the old one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from posttrain.objective.batch import Batch
from posttrain.objective.denominator import Denominator
from posttrain.objective.estimator import Objective
from posttrain.objective.mixture import Mixture
from posttrain.processes import here
from posttrain.rollout.context import StepContext
from posttrain.rollout.engine import Progress
from posttrain.rollout.exchange import packed, unpacked
from posttrain.rollout.rollout import rollout
from posttrain.trajectory import Group, Prompt, Trajectory


class Underway(Protocol):
    """Rollouts that an engine has begun."""

    def groups(self, progress: Progress | None = None) -> list[Group]: ...


@dataclass(frozen=True)
class _Done:
    """Rollouts that are there: of an engine that cannot do two things at a time, or of a checkpoint."""

    found: list[Group]

    def groups(self, progress: Progress | None = None) -> list[Group]:
        return self.found


@dataclass
class Drawn:
    """A step's rollouts under way. rows: the numbers of its prompts; sampled: how many completions."""

    step: int
    rows: list[int]
    sampled: int
    underway: Underway


class Ahead:
    """The rollouts of the next steps, in their order. `staleness`: how many steps ahead they are begun."""

    def __init__(self, prompts: Sequence[Prompt], staleness: int) -> None:
        self.prompts, self.staleness = prompts, staleness
        self.waiting: deque[Drawn] = deque()

    def next(
        self,
        step: int,
        total: int,
        take: Callable[[], list[int]],
        context: Callable[[int], StepContext],
        score: Callable[[list[Group]], None] | None = None,
    ) -> Drawn:
        """The rollouts of a step, after those of the steps until `step + staleness` were begun with present weights.

        take: the rows of one more step; context: the surroundings of a step. score: begins to score what is there,
        where that goes on beside training too.
        """
        begun = self.waiting[-1].step if self.waiting else step - 1
        for later in range(begun + 1, min(step + self.staleness, max(total - 1, step)) + 1):
            self.waiting.append(self._begin(later, take(), context(later)))
            then = getattr(self.waiting[-1].underway, "then", None)
            if score is not None and then is not None:
                then(score)
        return self.waiting.popleft()

    def _begin(self, step: int, rows: list[int], context: StepContext) -> Drawn:
        prompts = [self.prompts[i] for i in rows]
        asked = (prompts, context.group, context.sampling, context.seed, context.environment)
        begin = getattr(context.engine, "begin", None)
        if begin is None or here().several:  # processes that train together exchange what they drew
            found: Underway = _Done(rollout(context.engine, *asked))
        else:
            found = begin(*asked)
        return Drawn(step, rows, context.group * len(rows), found)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """What waits, as JSON and tensors; rollouts that are under way are waited for."""
        tensors: dict[str, Tensor] = {}
        steps = []
        for drawn in self.waiting:
            groups = drawn.underway.groups()
            drawn.underway = _Done(groups)
            arrays, facts = packed([t for g in groups for t in g.trajectories], [len(g) for g in groups])
            tensors |= {f"ahead/{drawn.step}/{name}": array for name, array in arrays.items()}
            steps.append({"step": drawn.step, "rows": drawn.rows, "sampled": drawn.sampled, "facts": facts})
        return steps, tensors

    def restore(self, steps: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> None:
        """Have what `state` gave wait again."""
        self.waiting.clear()
        for kept in steps:
            place = f"ahead/{kept['step']}/"
            arrays = {name.removeprefix(place): tensors[name] for name in tensors if name.startswith(place)}
            members = iter(unpacked(arrays, kept["facts"]))
            sizes = zip(kept["facts"]["sizes"], kept["rows"], strict=True)
            groups = [Group([next(members) for _ in range(size)], self.prompts[row]) for size, row in sizes]
            self.waiting.append(Drawn(kept["step"], list(kept["rows"]), kept["sampled"], _Done(groups)))


# -- which methods can learn from rollouts of older weights --------------------------------------------------------


def corrects(objective: Objective | Mixture) -> bool:
    """Whether the weight of what the policy drew depends on the policy that drew it, as the denominator has it."""
    if isinstance(objective, Objective):
        return _corrects(objective.denominator)
    return all(_corrects(term.objective.denominator) for term in objective.terms if "policy" in term.sources)


def _corrects(denominator: Denominator) -> bool:
    """Tried on three tokens that two samplers give different probabilities."""
    tokens, logp = torch.arange(4), torch.full((3,), -1.5)
    weights = []
    for sampled in (-1.4, -1.6):
        old = torch.full((4,), sampled)
        batch = Batch.of([Group([Trajectory(tokens, tokens > 0, old, old, reward=1.0)])])
        batch.old_logp, batch.advantage = batch.behaviour_logp_full, torch.ones(3)
        weights.append(denominator(batch, logp).weight)
    return not torch.equal(*weights)
