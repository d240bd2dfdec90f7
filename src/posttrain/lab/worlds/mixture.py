"""Several tasks as one: problems of all of them, each scored by the reward of its own."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from posttrain.evaluation.task import Split, Task, TaskItem
from posttrain.lab.worlds.world import WorldTask
from posttrain.reward.reward import Reward, Score
from posttrain.trajectory import Finish, PosttrainError, Prompt


def mix(tasks: Mapping[str, Task], *, name: str = "mixture", tag: bool = False, seed: int = 0) -> WorldTask:
    """One task of the problems of several; `meta["domain"]` of a problem names the task that it is from.

    A completion earns what its own task's reward gives. The components of all tasks stand beside each other (0 where a
    problem's task lacks one), and `correct`, of weight 0, says whether the problem's own task calls it right.

    Args:
        tasks: domain to task. Components of one name must have one weight in all of them.
        tag: put the domain in front of every prompt ("add: 23+58"), so that the model knows which task it is at.
        seed: of the order, in which problems of all domains alternate at random.

    Raises:
        PosttrainError: no task, tasks of several turns, or components of one name with different weights.
    """
    if not tasks:
        raise PosttrainError("mix: got no task; expected a mapping of domain to task")
    turns = [domain for domain, task in tasks.items() if getattr(task, "environment", None) is not None]
    if turns:
        raise PosttrainError(f"mix: {turns[0]} is a task of several turns; expected tasks with one completion a prompt")

    def labelled(domain: str, item: TaskItem) -> TaskItem:
        prompt = f"{domain}: {item.prompt}" if tag else item.prompt
        return replace(item, prompt=prompt, meta={**item.meta, "domain": domain})

    def shuffled(items: list[TaskItem], split: Split) -> list[TaskItem]:
        random.Random(f"{name}/{split}/{seed}").shuffle(items)
        return items

    draws = {domain: task.draw for domain, task in tasks.items() if isinstance(task, WorldTask) and task.draw}

    def draw(chance: random.Random, split: Split) -> TaskItem:
        domain = chance.choice(list(draws))
        return labelled(domain, draws[domain](chance, split))

    longest = max(task.sampling.max_tokens for task in tasks.values())
    return WorldTask(
        name=name,
        train=shuffled([labelled(d, item) for d, task in tasks.items() for item in task.train], "train"),
        heldout=shuffled([labelled(d, item) for d, task in tasks.items() for item in task.heldout], "heldout"),
        reward=_dispatching(tasks),
        metric="correct",
        sampling=replace(next(iter(tasks.values())).sampling, max_tokens=longest),
        description=", ".join(f"{domain}: {task.description or task.name}" for domain, task in tasks.items()),
        draw=draw if len(draws) == len(tasks) else None,
    )


def _dispatching(tasks: Mapping[str, Task]) -> Reward:
    weights: dict[str, float] = {"correct": 0.0}
    for domain, task in tasks.items():
        for component, weight in task.reward.weights.items():
            if weights.setdefault(component, weight) != weight:
                raise PosttrainError(
                    f"mix: {component} weighs {weight:g} in {domain} and {weights[component]:g} in another task; "
                    f"give it one weight, or another name"
                )
    parts: dict[str, Callable[..., float]] = {name: _Part(tasks, name) for name in weights}
    parts["correct"] = _Correct(tasks)
    return Reward({name: (parts[name], weight) for name, weight in weights.items()})


def _own_score(tasks: Mapping[str, Task], completion: str, prompt: Prompt, tokens: int, finish: Finish) -> Score:
    return tasks[prompt.meta["domain"]].reward.score(prompt, completion, tokens=tokens, finish=finish)


@dataclass(frozen=True)
class _Part:
    """One component, from the reward of the problem's own task."""

    tasks: Mapping[str, Task]
    name: str

    def __call__(self, completion: str, prompt: Prompt, *, tokens: int, finish: Finish) -> float:
        own = self.tasks[prompt.meta["domain"]].reward
        if self.name not in own.components:
            return 0.0
        score = Reward({self.name: own.components[self.name]}).score(prompt, completion, tokens=tokens, finish=finish)
        if score.errors:
            raise PosttrainError(score.errors[self.name])
        return score.parts[self.name]


@dataclass(frozen=True)
class _Correct:
    tasks: Mapping[str, Task]

    def __call__(self, completion: str, prompt: Prompt, *, tokens: int, finish: Finish) -> float:
        task = self.tasks[prompt.meta["domain"]]
        score = task.reward.score(prompt, completion, tokens=tokens, finish=finish)
        if score.errors:
            raise PosttrainError(next(iter(score.errors.values())))
        return float(task.correct(score))
