"""A counter that is added to and multiplied, step by step: what does it show at the end?

3;+4;*2      4       (3 + 4) * 2 = 14, of which it shows the last digit

Half of the problems need the order of their steps (sums and products mixed); in the other half any order gives the
same.
"""

from __future__ import annotations

import random

from posttrain.evaluation.task import TaskItem
from posttrain.lab.worlds.world import WorldTask, world_task
from posttrain.reward.reward import Reward
from posttrain.reward.verifiers import ExactMatch
from posttrain.trajectory import PosttrainError


def counter(
    *,
    steps: tuple[int, int] = (2, 2),
    order: float = 0.5,
    train: int = 1500,
    heldout: int = 300,
    seed: int = 0,
    name: str = "counter",
) -> WorldTask:
    """Problems of `steps` steps (fewest and most).

    order: the share of problems whose steps are of both kinds, and whose result another order would change.
    `meta`: domain (`order` or `any`), events (the steps as they stand in the prompt).
    """
    if not 2 <= steps[0] <= steps[1] <= 6 or not 0 <= order <= 1:
        raise PosttrainError(
            f"counter: steps is {steps}, order {order}; expected 2 to 6 steps, and a share from 0 to 1"
        )

    def draw(chance: random.Random) -> TaskItem:
        while True:
            start, count = chance.randint(0, 9), chance.randint(*steps)
            domain = "order" if chance.random() < order else "any"
            sign = chance.choice("+*")
            signs = [chance.choice("+*") if domain == "order" else sign for _ in range(count)]
            events = [s + str(chance.randint(1 if s == "+" else 2, 9)) for s in signs]
            answer = shown(start, events)
            if domain == "any" or shown(start, sorted(events)) != shown(start, sorted(events, reverse=True)):
                break
        return TaskItem(";".join([str(start), *events]), answer, {"domain": domain, "events": events}, answer)

    return world_task(
        name,
        draw,
        Reward({"answer": (ExactMatch(normalise_numbers=False), 1.0)}),
        train=train,
        heldout=heldout,
        seed=seed,
        max_tokens=3,
        description=f"the last digit of a counter after {steps[0]} to {steps[1]} steps",
    )


def shown(start: int, events: list[str]) -> str:
    """The digit after all events."""
    value = start
    for event in events:
        value = (value + int(event[1:]) if event[0] == "+" else value * int(event[1:])) % 10
    return str(value)
