"""The work both sides do: cases, their rows (made by seed, no data set needed), the reward of the online case.

The rows are word problems with worked solutions in the manner of GSM8K; with the chat template of SmolLM2 a row has 225
tokens on average with a standard deviation of 71 (of 1,000 rows; the first 2,000 of GSM8K's training set: 216 and 69).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement: what a step is, and what is wanted of it.

    batch: rows (sft), pairs (dpo) or prompts (grpo) a step; group: completions a prompt; max_tokens: of a completion;
    lora: rank of adapters on all linear layers, 0 to train all weights; turns: how often ours and TRL take turns.
    target: the ratio of rates, ours over TRL's, that is wanted, if one is. passes: forward passes a step is worth (a
    backward pass counts two, one where the weights stay): training 3, a reference 1, sampling 1.
    """

    name: str
    method: Literal["sft", "dpo", "grpo"]
    batch: int
    target: float | None
    passes: int
    learning_rate: float
    group: int = 1
    max_tokens: int = 0
    lora: int = 0
    turns: int = 1

    @property
    def online(self) -> bool:
        return self.max_tokens > 0

    @property
    def sequences(self) -> int:
        """Sequences a step."""
        return self.batch * (2 if self.method == "dpo" else self.group)


CASES = {
    case.name: case
    for case in (
        Case("sft", "sft", batch=8, target=3, passes=3, learning_rate=1e-5, turns=3),
        Case("dpo", "dpo", batch=4, target=3, passes=4, learning_rate=1e-6, turns=3),
        Case("grpo", "grpo", batch=8, target=4, passes=4, learning_rate=1e-6, group=8, max_tokens=24, turns=2),
        Case("sft-lora", "sft", batch=8, target=None, passes=2, learning_rate=1e-4, lora=16),
        Case("long-prompt", "grpo", batch=1, target=4, passes=4, learning_rate=1e-6, group=16, max_tokens=32),
        Case("long-completions", "grpo", batch=4, target=None, passes=4, learning_rate=1e-6, group=4, max_tokens=128),
    )
}


MAIN = ("sft", "dpo", "grpo")  # what a run measures unless it is told otherwise


def rows_of(case: Case, steps: int, seed: int = 0) -> list[Row]:
    """The rows of `steps` steps, in the order both sides take them: conversations, as both sides read them."""
    draw = random.Random(seed)
    make = {"sft": _demonstration, "dpo": _preference, "grpo": _far_sum if case.name == "long-prompt" else _sum}
    return [make[case.method](draw) for _ in range(steps * case.batch)]


def reward(completion: str, answer: int) -> float:
    """How near the last whole number of a completion comes to the answer: 1 if it is it, 0 without any number.

    Graded, so that the completions of hardly any prompt all earn the same and every group has a gradient to compute.
    """
    numbers = re.findall(r"-?\d+", completion)
    if not numbers:
        return 0.0
    guess = int(numbers[-1][:12])
    return 1 - abs(guess - answer) / (abs(guess) + abs(answer) + 1)


# Rows


def _demonstration(draw: random.Random) -> Row:
    problem = _Problem(draw)
    return {"prompt": _user(problem.question), "completion": _assistant(problem.solution())}


def _preference(draw: random.Random) -> Row:
    problem = _Problem(draw)
    slip = draw.randrange(len(problem.steps))
    return {
        "prompt": _user(problem.question),
        "chosen": _assistant(problem.solution()),
        "rejected": _assistant(problem.solution(slip)),
    }


def _sum(draw: random.Random) -> Row:
    terms = [draw.randint(1, 99) for _ in range(draw.randint(2, 4))]
    signs = [draw.choice("+-") for _ in terms[1:]]
    answer = terms[0] + sum(t if s == "+" else -t for s, t in zip(signs, terms[1:], strict=True))
    question = str(terms[0]) + "".join(f" {s} {t}" for s, t in zip(signs, terms[1:], strict=True))
    return {"prompt": _user(f"Calculate {question}. Give only the number."), "answer": answer}


def _far_sum(draw: random.Random) -> Row:
    """A sum behind about 500 tokens of other problems."""
    sum_ = _sum(draw)
    words: list[str] = []
    while len(words) < 330:
        words += _Problem(draw).question.split()
    return {**sum_, "prompt": _user(f"{' '.join(words[:330])} {sum_['prompt'][0]['content']}")}


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


# Word problems

NAMES = ("Maya", "Oliver", "Priya", "Tom", "Amina", "Lucas", "Hana", "Diego", "Greta", "Samuel", "Ingrid", "Kofi")
ITEMS = ("apples", "marbles", "stickers", "pencils", "muffins", "stamps", "books", "tickets", "shells", "beads")
PLACES = ("at the market", "in the kitchen", "at school", "in the garden", "at the fair", "in the attic")
STEPS, SHARES = (2, 3, 4, 5, 6, 7, 8), (22, 26, 22, 14, 9, 5, 2)  # how many steps a problem has, in percent

# sentence of the question, its sign, sentence of the solution; {n} is the amount of the step, {m} what there is then
EVENTS = (
    ("A neighbour brings {n} more {item}.", "+", "With the neighbour's {n} there are {sum} {item}."),
    ("{name} gives {n} of them to a friend.", "-", "After the gift {name} has {sum} {item} left."),
    ("On the way home {n} {item} are lost.", "-", "Without the lost ones {sum} {item} remain."),
    ("The next day {name} finds another {n} {item} {place}.", "+", "The next day that makes {sum} {item} in all."),
    ("An aunt sends a parcel, and the number of {item} is now {n} times as large.", "*",
     "The parcel multiplies them, so {name} now has {sum} {item}."),
    ("{name} buys {n} {item} with the money from last week.", "+", "{name} had some before, so that is {sum} {item}."),
)  # fmt: skip


class _Problem:
    """A count that goes through some events; `steps` holds each event with its amount."""

    def __init__(self, draw: random.Random) -> None:
        self.words = {"name": draw.choice(NAMES), "item": draw.choice(ITEMS), "place": draw.choice(PLACES)}
        self.start = total = draw.randint(12, 90)
        self.steps: list[tuple[tuple[str, str, str], int]] = []
        for _ in range(draw.choices(STEPS, SHARES)[0]):
            event = draw.choice([e for e in EVENTS if (e[1] != "-" or total > 5) and (e[1] != "*" or total < 300)])
            limit = {"+": 60, "-": total - 1, "*": 4}[event[1]]
            n = draw.randint(2, limit)
            total = _apply(event[1], total, n)
            self.steps.append((event, n))

    @property
    def question(self) -> str:
        told = [event[0].format(n=n, **self.words) for event, n in self.steps]
        first = "{name} has {start} {item} {place}.".format(start=self.start, **self.words)
        return " ".join([first, *told, "How many {item} are there in the end?".format(**self.words)])

    def solution(self, slip: int | None = None) -> str:
        """The worked solution; one step is miscalculated, and its explanation left out, where `slip` names it."""
        lines, total = [], self.start
        for i, ((_, sign, said), n) in enumerate(self.steps):
            after = _apply(sign, total, n) + (3 if i == slip else 0)
            equation = f"{total} {sign} {n} = <<{total}{sign}{n}={after}>>{after}"
            lines.append(equation if i == slip else said.format(n=n, sum=equation, **self.words))
            total = after
        return "\n".join([*lines, f"#### {total}"])


_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b,
}  # fmt: skip


def _apply(sign: str, total: int, n: int) -> int:
    return _OPERATIONS[sign](total, n)
