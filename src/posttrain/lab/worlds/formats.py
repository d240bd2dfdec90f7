"""Instructions with checkable constraints: what to write, and how.

rev dcab;up;dot      BACD.      the word turned round, in capitals, with a full stop
rep x 4;dash         x-x-x-x    a letter so many times, with dashes between
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from posttrain.evaluation.task import TaskItem
from posttrain.lab.worlds.arithmetic import Range
from posttrain.lab.worlds.world import WorldTask, world_task
from posttrain.reward.reward import Reward
from posttrain.trajectory import Finish, PosttrainError, Prompt

CONTENTS = ("copy", "rep", "rev", "sort")
CONSTRAINTS = ("up", "dash", "dot", "quote")  # in the order in which they are applied and named
_LETTERS = "abcdefgh"


def formats(
    *,
    contents: Sequence[str] = CONTENTS,
    constraints: Range = (1, 3),
    length: Range = (3, 5),
    train: int = 2000,
    heldout: int = 200,
    seed: int = 0,
    name: str = "formats",
) -> WorldTask:
    """Write a string made from another, under some constraints; both halves of the reward weigh 0.5.

    A completion is right where both are 1: `answer`, its letters are those asked for, in their order; `format`, the
    share of the four constraints that are as they should be (met where asked for, absent where not).

    Args:
        contents: out of copy, rep (repeat a letter), rev (reverse), sort.
        constraints: the fewest and most of a problem, out of up (capitals), dash (dashes between the letters), dot (a
            full stop at the end), quote (quotation marks around all).

    `meta`: domain (the kind of content), constraints, letters (what `answer` looks for).
    """
    if not contents or set(contents) - set(CONTENTS):
        raise PosttrainError(f"formats: contents is {list(contents)}; expected some of {', '.join(CONTENTS)}")
    if not 0 <= constraints[0] <= constraints[1] <= len(CONSTRAINTS) or not 1 <= length[0] <= length[1]:
        raise PosttrainError(
            f"formats: constraints is {constraints}, length {length}; expected ranges from 0 to {len(CONSTRAINTS)} "
            f"and from 1"
        )

    def draw(chance: random.Random) -> TaskItem:
        kind = chance.choice(list(contents))
        size = chance.randint(*length)
        word = "".join(chance.choices(_LETTERS, k=1 if kind == "rep" else size))
        letters = {"copy": word, "rep": word * size, "rev": word[::-1], "sort": "".join(sorted(word))}[kind]
        chosen = chance.sample(CONSTRAINTS, chance.randint(*constraints))
        wanted = [c for c in CONSTRAINTS if c in chosen]
        prompt = ";".join([f"{kind} {word}" + (f" {size}" if kind == "rep" else ""), *wanted])
        meta = {"domain": kind, "constraints": wanted, "letters": letters}
        answer = formatted(letters, wanted)
        return TaskItem(prompt, answer, meta, answer)

    return world_task(
        name,
        draw,
        Reward({"answer": (answer_score, 0.5), "format": (format_score, 0.5)}),
        train=train,
        heldout=heldout,
        seed=seed,
        max_tokens=2 * length[1] + 4,
        metric=None,
        description=f"{', '.join(contents)} with {constraints[0]} to {constraints[1]} constraints",
    )


def formatted(letters: str, constraints: Sequence[str]) -> str:
    """The letters as the constraints want them."""
    text = letters.upper() if "up" in constraints else letters
    text = "-".join(text) if "dash" in constraints else text
    text = f"{text}." if "dot" in constraints else text
    return f'"{text}"' if "quote" in constraints else text


def met(completion: str) -> set[str]:
    """The constraints that a completion looks to meet, if it is well formed."""
    text = completion.strip()
    quoted = len(text) > 1 and text[0] == text[-1] == '"'
    inner = text.strip('"')
    body = inner.removesuffix(".")
    found = {"quote"} if quoted else set()
    if inner.endswith("."):
        found.add("dot")
    if "-" in body:
        found.add("dash")
    if body.upper() == body and any(c.isalpha() for c in body):
        found.add("up")
    return found


def answer_score(completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
    """1 where the letters are right, however they are written."""
    return float("".join(c for c in completion if c.isalpha()).lower() == prompt.meta["letters"])


def format_score(completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
    """Share of the constraints that are as they should be; 0 for signs that no constraint accounts for."""
    text = completion.strip()
    wanted, found = set(prompt.meta["constraints"]), met(text)
    if formatted("".join(c for c in text if c.isalpha()).lower(), [c for c in CONSTRAINTS if c in found]) != text:
        return 0.0
    return sum((c in wanted) == (c in found) for c in CONSTRAINTS) / len(CONSTRAINTS)
