"""Letters to count, asked in three formats: to be judged (`a in abcab=3?`), chosen (`a in abcab A. 3 B. 2 C. 0`), or
given (`a in abcab`).
"""

from __future__ import annotations

import random

from posttrain.evaluation.reposed import as_choice, as_judgement
from posttrain.evaluation.task import TaskItem
from posttrain.lab.worlds.arithmetic import Range
from posttrain.lab.worlds.world import WorldTask, sided, world_task
from posttrain.reward.answer_formats import FORMATS, InFormat
from posttrain.reward.reward import Reward
from posttrain.reward.verifiers import ExactMatch
from posttrain.trajectory import PosttrainError

SHORT = {"judge": "{question}={proposed}?", "choice": "{question} {options}", "open": "{question}"}


def counting(
    *,
    form: str = "open",
    length: Range = (5, 8),
    alphabet: str = "abc",
    options: int = 3,
    train: int = 1500,
    heldout: int = 200,
    seed: int = 0,
    name: str = "counting",
) -> WorldTask:
    """How often the first letter stands in a string, in one of the formats `judge`, `choice` and `open`.

    Judgements and choices show the answer, so they are made of strings whose open question is not held out, whichever
    side of the border they lie on themselves. `meta`: domain, length, format.
    """
    if form not in FORMATS:
        raise PosttrainError(f"counting: form is {form!r}; expected one of {', '.join(FORMATS)}")
    if not 2 <= length[0] <= length[1] or len(alphabet) < 2:
        raise PosttrainError(
            f"counting: length is {length}, alphabet {alphabet!r}; expected a range from 2, two letters"
        )

    def asked(chance: random.Random) -> TaskItem:
        letter = chance.choice(alphabet)
        text = "".join(chance.choices(alphabet, k=chance.randint(*length)))
        count = str(text.count(letter))
        return TaskItem(f"{letter} in {text}", count, {"domain": name, "length": len(text), "format": "open"}, count)

    shown = sided(name, asked)

    def draw(chance: random.Random) -> TaskItem:
        if form == "open":
            return asked(chance)
        item = shown(chance, "train")
        if form == "judge":
            return as_judgement(item, chance.random() < 0.5, other_count, SHORT, chance)
        return as_choice(item, options, other_count, SHORT, " ", chance)

    return world_task(
        name,
        draw,
        Reward({"answer": (InFormat(open=ExactMatch()), 1.0)}),
        train=train,
        heldout=heldout,
        seed=seed,
        max_tokens=4,
        description=f"a letter counted in {length[0]} to {length[1]}, {form}",
    )


def other_count(item: TaskItem, chance: random.Random) -> str:
    """A count that the string could have, too."""
    return str(chance.randint(0, int(item.meta["length"])))
