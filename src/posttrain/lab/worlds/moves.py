"""Things that are moved about: where is one of them at the end?

aX;bY;aZ;a          Z

Half of the questions need the order of the events (the thing was moved more than once); in the other half it was moved
once, and its place can be read off in any order.
"""

from __future__ import annotations

import random

from posttrain.evaluation.task import TaskItem
from posttrain.lab.worlds.world import WorldTask, world_task
from posttrain.reward.reward import Reward
from posttrain.reward.verifiers import ExactMatch
from posttrain.trajectory import PosttrainError

PLACES = "UVWXYZ"
THINGS = "abcdef"


def moves(
    *,
    events: tuple[int, int] = (4, 6),
    order: float = 0.5,
    train: int = 1500,
    heldout: int = 300,
    seed: int = 0,
    name: str = "moves",
) -> WorldTask:
    """Stories of `events` moves (fewest and most), and a question about the place of one thing at their end.

    order: the share of questions about a thing that was moved more than once, each time to another place.
    `meta`: domain (`order` or `once`), events (as they stand in the prompt).
    """
    if not 3 <= events[0] <= events[1] <= 12 or not 0 <= order <= 1:
        raise PosttrainError(
            f"moves: events is {events} and order {order}; expected 3 to 12 events, and a share from 0 to 1"
        )

    def draw(chance: random.Random) -> TaskItem:
        count = chance.randint(*events)
        asked, *others = chance.sample(THINGS, chance.randint(3, 4))
        domain = "order" if chance.random() < order else "once"
        times = chance.randint(2, 3) if domain == "order" else 1
        visited = chance.sample(PLACES, times)
        when = sorted(chance.sample(range(count), times))
        story = [chance.choice(others) + chance.choice(PLACES) for _ in range(count)]
        for place, at in zip(visited, when, strict=True):
            story[at] = asked + place
        meta = {"domain": domain, "events": story}
        return TaskItem(";".join([*story, asked]), visited[-1], meta, visited[-1])

    return world_task(
        name,
        draw,
        Reward({"answer": (ExactMatch(normalise_numbers=False), 1.0)}),
        train=train,
        heldout=heldout,
        seed=seed,
        max_tokens=3,
        description=f"where a thing is after {events[0]} to {events[1]} moves",
    )
