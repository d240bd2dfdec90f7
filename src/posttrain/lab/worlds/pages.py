"""Text as a language model reads it: pages of problems of several subjects with their solutions.

46+57                     written sums
6+7=13 4+5+1=10 103
a:3;b:a+4;b?              word problems
a+4=b:7;7
pet of Tobi?              facts about people
cat
rev dcab;up;dot           instructions
BACD.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from posttrain.evaluation.task import Split, TaskItem
from posttrain.lab.worlds.arithmetic import arithmetic
from posttrain.lab.worlds.facts import facts
from posttrain.lab.worlds.formats import formats
from posttrain.lab.worlds.mixture import mix
from posttrain.lab.worlds.words import words
from posttrain.lab.worlds.world import BORDER, WorldTask, world_task
from posttrain.reward.reward import Reward
from posttrain.trajectory import Finish, Prompt

POOL = 150  # held-out problems of a subject that held-out pages are made of
SUBJECTS = ("sums", "words", "facts", "formats")


def mixed(*, train: int = 1200, heldout: int = 300, seed: int = 0) -> WorldTask:
    """Problems of all subjects in equal parts, each answered in one line; `meta["domain"]` names the subject."""
    parts = _subjects(train // len(SUBJECTS), heldout // len(SUBJECTS), seed)
    task = mix(parts, name="mixed", seed=seed)
    return replace(task, sampling=replace(task.sampling, stop=("\n",)))  # on a page the next problem follows


def pages(*, length: int = 126, train: int = 200, heldout: int = 50, seed: int = 0, name: str = "pages") -> WorldTask:
    """Pages of problems of all subjects, each with its solution in the line below it.

    The prompt is a page's first problem, the solution the rest of the page, so that a model that is trained on
    demonstrations learns to predict problems as well as solutions. A page ends where it is full, in the middle of a
    line if need be. Its problems are all on one side of the held-out border.

    Args:
        length: characters of a page; with the start and the end token a page has two tokens more.
    """
    subjects = _subjects(0, POOL, 0)

    def problem(chance: random.Random, split: Split) -> TaskItem:
        task = subjects[chance.choice(SUBJECTS)]
        if split == "heldout":
            return chance.choice(task.heldout)
        assert task.draw is not None
        return task.draw(chance, "train")

    def draw(chance: random.Random) -> TaskItem:
        split: Split = "heldout" if chance.randrange(BORDER) == 0 else "train"
        first = problem(chance, split)
        room = length - len(str(first.prompt)) - 1
        text = str(first.solution)
        while len(text) < room:
            following = problem(chance, split)
            text += f"\n{following.prompt}\n{following.solution}"
        return TaskItem(first.prompt, text[:room], {"domain": name}, text[:room])

    return world_task(
        name,
        draw,
        Reward({"answer": (exactly, 1.0)}),
        train=train,
        heldout=heldout,
        seed=seed,
        max_tokens=length,
        description=f"pages of {length} characters: {', '.join(SUBJECTS)}",
    )


def exactly(completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
    """1 where the completion is the answer to the letter."""
    return float(completion.strip() == str(prompt.answer).strip())


def _subjects(train: int, heldout: int, seed: int) -> dict[str, WorldTask]:
    sizes: dict[str, Any] = {"train": train, "heldout": heldout, "seed": seed}
    written = formats(name="formats", **sizes)
    return {
        "sums": arithmetic(style="worked", name="sums", **sizes),
        "words": words(depth=(1, 2), operations="+", name="words", **sizes),
        "facts": facts(count=100, exponent=0.5, name="facts", **sizes),
        "formats": replace(written, reward=Reward({"answer": (exactly, 1.0)}), metric="answer"),
    }
