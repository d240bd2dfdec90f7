"""What every world shares: problems drawn by seed, a fixed border between training and held-out problems, corpora.

Whether a problem is held out is a property of its prompt alone, the same for every seed, size and mixture. So no model
of the lab was pre-trained on a problem that any task of the lab holds out.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from posttrain.evaluation.task import Split, Task, TaskItem
from posttrain.reward.reward import Reward
from posttrain.trajectory import Group, PosttrainError, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.rollout.environment import Environment

Draw = Callable[[random.Random], TaskItem]  # makes one problem
SidedDraw = Callable[[random.Random, Split], TaskItem]  # makes one on the asked side of the held-out border

BORDER = 5  # one prompt in five is held out
PATIENCE = 5000  # draws without a new problem after which a world is taken to be exhausted


@dataclass(slots=True)
class WorldTask(Task):
    """A task whose problems come from a generator.

    draw: makes one problem of a split, with a solution, at the frequencies of a pre-training corpus (those of `train`
    and `heldout` may be others). environment: who answers the policy, in worlds of several turns.
    """

    draw: SidedDraw | None = None
    environment: Environment | None = None

    def corpus(self, rows: int, seed: int = 0) -> list[TaskItem]:
        """Problems to pre-train on, drawn with repetition and never from beyond the held-out border."""
        if self.draw is None:
            raise PosttrainError(f"task {self.name} has no generator; a corpus needs a task made by a world of the lab")
        chance = _generator(self.name, "corpus", seed)
        return [self.draw(chance, "train") for _ in range(rows)]

    def demonstrated(self, items: Sequence[TaskItem], tokenizer: PreTrainedTokenizerBase) -> list[Group]:
        """A demonstration for each of `items`, in their order; problems and solutions may occur again and again."""
        layers: list[dict[int, TaskItem]] = []  # a task holds no prompt twice: the n-th solutions of all prompts
        place: dict[tuple[int, str | None], tuple[int, int]] = {}
        solutions: Counter[int] = Counter()
        for item in items:
            if (item.key, item.solution) in place:
                continue
            layer = solutions[item.key]
            solutions[item.key] += 1
            if layer == len(layers):
                layers.append({})
            place[item.key, item.solution] = layer, len(layers[layer])
            layers[layer][item.key] = item
        made = [replace(self, train=list(part.values()), heldout=[]).demonstrations(tokenizer) for part in layers]
        found = (place[item.key, item.solution] for item in items)
        return [made[layer][row] for layer, row in found]


def is_heldout(item: TaskItem) -> bool:
    """Whether the problem lies beyond the held-out border: one prompt in five does, by a hash of its text."""
    return item.key % BORDER == 0


def world_task(
    name: str,
    draw: Draw,
    reward: Reward,
    *,
    train: int,
    heldout: int,
    seed: int,
    max_tokens: int,
    metric: str | None = "answer",
    pretraining: Draw | None = None,
    environment: Environment | None = None,
    description: str = "",
    kind: type[WorldTask] = WorldTask,
) -> WorldTask:
    """A task of `train` and `heldout` distinct problems. Each split depends on the seed and its own size alone.

    max_tokens: longest completion, the end token included. pretraining: draws for a corpus, where these differ.
    Raises PosttrainError where the world has too few problems.
    """
    if min(train, heldout) < 0:
        raise PosttrainError(f"world {name}: train={train}, heldout={heldout}; expected numbers from 0")
    return kind(
        name=name,
        train=_distinct(name, draw, "train", train, seed),
        heldout=_distinct(name, draw, "heldout", heldout, seed),
        reward=reward,
        metric=metric,
        sampling=Sampling(max_tokens=max_tokens),
        description=description,
        draw=sided(name, pretraining or draw),
        environment=environment,
    )


def _generator(name: str, purpose: str, seed: int) -> random.Random:
    return random.Random(f"{name}/{purpose}/{seed}")  # text is hashed the same way in every process


def sided(name: str, draw: Draw) -> SidedDraw:
    """`draw`, repeated until a problem lies on the asked side of the border."""

    def drawn(chance: random.Random, split: Split) -> TaskItem:
        for _ in range(PATIENCE):
            item = draw(chance)
            if is_heldout(item) == (split == "heldout"):
                return item
        raise PosttrainError(f"world {name}: it has no {split} problem under these arguments; widen their ranges")

    return drawn


def _distinct(name: str, draw: Draw, split: Split, count: int, seed: int) -> list[TaskItem]:
    border = sided(name, draw)
    chance = _generator(name, split, seed)
    found: dict[int, TaskItem] = {}
    repeats = 0
    while len(found) < count:
        item = border(chance, split)
        repeats = repeats + 1 if item.key in found else 0
        found.setdefault(item.key, item)
        if repeats == PATIENCE:
            raise PosttrainError(
                f"world {name}: {split}={count}, but only {len(found)} distinct {split} problems were found under "
                f"these arguments; ask for fewer or widen the ranges"
            )
    return list(found.values())
