"""Documents whose next token needs a short hidden computation: the sum of digits, modulo 5.

    34213          the prompt
    3              the document goes on with the sum, 13, modulo 5
    [42241033]3    a corpus also shows a scratch before it, or only a scratch's beginning: each further digit and the
                   running sum with it (3, and 4 is 2; and 2 is 4; and 1 is 0; and 3 is 3)

In the manner of RLP, 2025, arXiv 2510.01265 (card 050), and Reinforcement Mid-Training, 2025, arXiv 2509.24375 (064).
"""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass

from posttrain.evaluation.task import TaskItem
from posttrain.lab.worlds.arithmetic import Range
from posttrain.lab.worlds.world import WorldTask, world_task
from posttrain.reward.reward import Reward
from posttrain.trajectory import Finish, PosttrainError, Prompt

ELSEWHERE = 0.3  # of a corpus' scratches, the share that stands before any token of the solution


def sums(
    *,
    terms: Range = (5, 6),
    copied: bool = False,
    modulus: int = 5,
    scratch: float = 0.7,
    budget: bool = False,
    train: int = 2000,
    heldout: int = 200,
    seed: int = 0,
    name: str = "sums",
) -> WorldTask:
    """Digits below `modulus`, and their sum modulo it. Solutions hold no scratch; in a corpus some do.

    Args:
        terms: the fewest and most digits. copied: the document repeats the digits first ("34213=3"), so that most of
            its tokens can be read off and one cannot.
        scratch: the share of a corpus that has a scratch in brackets somewhere in the solution, cut off behind a
            running sum drawn at random: a whole one ends in the sum itself, and nothing is left to compute.
        budget: a number of two digits stands before a scratch's bracket, which means nothing in the corpus.

    `meta`: domain, terms. The component `answer` is 1 where a completion without its scratch is the solution.
    """
    if not 2 <= terms[0] <= terms[1] <= 9 or not 2 <= modulus <= 10 or not 0 <= scratch <= 1:
        raise PosttrainError(
            f"sums: terms={terms}, modulus={modulus}, scratch={scratch}; expected 2 to 9 digits, a modulus from 2 to "
            f"10 and a share"
        )

    def plain(chance: random.Random) -> TaskItem:
        digits = [chance.randrange(modulus) for _ in range(chance.randint(*terms))]
        text = "".join(map(str, digits))
        solution = (f"{text}=" if copied else "") + str(sum(digits) % modulus)
        return TaskItem(text, solution, {"domain": name, "terms": len(digits)}, solution)

    def shown(chance: random.Random) -> TaskItem:
        item = plain(chance)
        if chance.random() < scratch:
            assert item.solution is not None
            pairs = working([int(c) for c in str(item.prompt)], modulus)
            thought = "".join(pairs[: chance.randint(0, len(pairs))])
            place = len(item.solution) - 1
            if chance.random() < ELSEWHERE:
                place = chance.randrange(len(item.solution))
            mark = f"{chance.randint(1, 2 * len(pairs) + 4):02d}" if budget else ""
            item.solution = f"{item.solution[:place]}{mark}[{thought}]{item.solution[place:]}"
        return item

    return world_task(
        name,
        plain,
        Reward({"answer": (BehindScratch(budget), 1.0)}),
        train=train,
        heldout=heldout,
        seed=seed,
        max_tokens=(3 if copied else 2) * terms[1] + 4,
        pretraining=shown,
        description=f"sums of {terms[0]} to {terms[1]} digits modulo {modulus}",
    )


def working(digits: list[int], modulus: int) -> list[str]:
    """For every digit but the first: the digit, and the sum up to it, modulo `modulus`."""
    sums = list(itertools.accumulate(digits))
    return [f"{digit}{total % modulus}" for digit, total in zip(digits[1:], sums[1:], strict=True)]


@dataclass(frozen=True)
class BehindScratch:
    """1 where a completion is the document's, without what stands in brackets (and the number of two digits before)."""

    budget: bool

    def __call__(self, completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
        number = r"(?:\d\d)?" if self.budget else ""
        return float(re.sub(rf"{number}\[\d*\]", "", completion.strip()) == prompt.answer)
