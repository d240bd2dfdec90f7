"""Arithmetic with controllable digits, carries and operations; answered tersely or with written working.

46+57           the prompt
103             terse
ans: 1 0 3      spaced
6+7=13 4+5+1=10 103    worked: a column a step, from the units, with carries and borrows; then the answer
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from posttrain.evaluation.task import TaskItem
from posttrain.lab.worlds.mixture import mix
from posttrain.lab.worlds.world import PATIENCE, WorldTask, world_task
from posttrain.reward.reward import Reward
from posttrain.trajectory import Finish, PosttrainError, Prompt

Style = Literal["terse", "spaced", "worked"]
Range = tuple[int, int]
_NUMBER = r"(?:0|[1-9]\d*)"
_PATTERNS: dict[Style, re.Pattern[str]] = {
    "terse": re.compile(_NUMBER),
    "spaced": re.compile(r"ans: \d(?: \d)*"),
    "worked": re.compile(rf"(?:\d+(?:[+*-]\d+)+=\d+ )+{_NUMBER}"),
}


def arithmetic(
    *,
    digits: Sequence[Range] = ((2, 2), (2, 2)),
    operations: str = "+",
    carries: Range | None = None,
    style: Style = "terse",
    process: float = 0.0,
    train: int = 2000,
    heldout: int = 200,
    seed: int = 0,
    name: str = "arithmetic",
) -> WorldTask:
    """Sums, differences and products of whole numbers; results are never negative.

    Args:
        digits: the fewest and most digits of each operand: `((2, 2), (1, 1))` is a two-digit and a one-digit number.
        operations: the symbols to draw from, out of `+-*`; one that stands twice is drawn twice as often.
        carries: the fewest and most carries (borrows) of a problem; None for any. Not for products.
        style: of the solutions; the verifier accepts every style. Working is written for two operands, of which the
            second has one digit in products.
        process: weight of the component `process`, the share of the working's steps that are right (beside `answer`,
            whose weight is 1).

    `meta`: domain, operation(s), digits (of the longest operand), carries, steps (of the working, where there is one).
    """
    _check(digits, operations, carries, style)

    def draw(chance: random.Random) -> TaskItem:
        for _ in range(PATIENCE):
            operands = [_operand(chance, low, high) for low, high in digits]
            chosen = [chance.choice(operations) for _ in operands[1:]]
            item = _problem(operands, chosen, style, name)
            if item is not None and (carries is None or carries[0] <= item.meta["carries"] <= carries[1]):
                return item
        raise PosttrainError(f"arithmetic: no problem with digits {digits} has carries in {carries}; widen the range")

    longest, widest = sum(high for _, high in digits) + 2, max(high for _, high in digits)
    return world_task(
        name,
        draw,
        Reward({"answer": (answer_score, 1.0), "process": (process_score, process)}),
        train=train,
        heldout=heldout,
        seed=seed,
        max_tokens={"terse": longest, "spaced": 2 * longest + 6, "worked": 10 * widest + 3}[style],
        description=f"{operations} of numbers with {' and '.join(f'{a}-{b}' for a, b in digits)} digits, {style}",
    )


def tiers(
    tiers: Mapping[str, Mapping[str, Any]] | None = None, *, train: int = 1500, heldout: int = 300, seed: int = 0
) -> WorldTask:
    """Arithmetic of several difficulties in one task, in equal parts; `meta["domain"]` names the tier.

    tiers: name to arguments of `arithmetic`; by default sums of two-digit numbers without and with carries, and of
        three-digit numbers.
    """
    chosen = DEFAULT_TIERS if tiers is None else tiers
    parts = {
        name: arithmetic(
            **{**arguments, "name": name, "train": train // len(chosen), "heldout": heldout // len(chosen)}, seed=seed
        )
        for name, arguments in chosen.items()
    }
    return mix(parts, name="tiers", seed=seed)


DEFAULT_TIERS: dict[str, dict[str, Any]] = {
    "easy": {"digits": ((2, 2), (2, 2)), "carries": (0, 0)},
    "medium": {"digits": ((2, 2), (2, 2)), "carries": (1, 2)},
    "hard": {"digits": ((3, 3), (3, 3))},
}


def style_of(completion: str) -> Style | None:
    """The style a completion is written in; None where it is in none."""
    text = completion.strip()
    return next((style for style, pattern in _PATTERNS.items() if pattern.fullmatch(text)), None)


def answer_score(completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
    """1 where the completion is in one of the styles and gives the answer, else 0."""
    text = completion.strip()
    style = style_of(text)
    if style is None:
        return 0.0
    given = text.removeprefix("ans: ").replace(" ", "") if style == "spaced" else text.rpartition(" ")[2]
    return float(given == prompt.answer)


def process_score(completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
    """Share of the working's steps that stand at their place; steps too many count as wrong ones."""
    gold = prompt.meta.get("steps") or []
    if not gold or style_of(completion) != "worked":
        return 0.0
    given = completion.split()[:-1]
    right = sum(a == b for a, b in zip(gold, given, strict=False))
    return right / max(len(gold), len(given))


def written(operands: Sequence[int], operation: str, result: int, style: Style) -> str:
    """A solution in the given style."""
    if style == "terse":
        return str(result)
    if style == "spaced":
        return "ans: " + " ".join(str(result))
    return " ".join([*working(operands[0], operation, operands[1]), str(result)])


def working(a: int, operation: str, b: int) -> list[str]:
    """The steps of the written method, from the units: `6+7=13`, then `4+5+1=10` with the carry."""
    left = [int(d) for d in reversed(str(a))]
    if operation == "*":
        right = [b] * len(left)
    else:
        right = [int(d) for d in reversed(str(b))]
        size = max(len(left), len(right))
        left, right = left + [0] * (size - len(left)), right + [0] * (size - len(right))
    steps, carry = [], 0
    for x, y in zip(left, right, strict=True):
        carried = f"{'-' if operation == '-' else '+'}{carry}" if carry else ""
        if operation == "-":
            borrow = int(x - y - carry < 0)
            steps.append(f"{x + 10 * borrow}-{y}{carried}={x + 10 * borrow - y - carry}")
            carry = borrow
        else:
            value = (x * y if operation == "*" else x + y) + carry
            steps.append(f"{x}{operation}{y}{carried}={value}")
            carry = value // 10
    return steps


def carries_of(a: int, operation: str, b: int) -> int:
    """How many columns of the sum or difference hand a carry or a borrow on."""
    count = carry = 0
    while a or b:
        x, y = a % 10, b % 10
        carry = int(x + y + carry > 9) if operation == "+" else int(x - y - carry < 0)
        count, a, b = count + carry, a // 10, b // 10
    return count


def _problem(operands: list[int], operations: list[str], style: Style, name: str) -> TaskItem | None:
    """The problem, or None where its result (or, read from the left, what leads to it) would be negative."""
    if len(operands) == 2 and operations == ["-"] and operands[0] < operands[1]:
        operands = operands[::-1]
    prompt = str(operands[0])
    value, carries = operands[0], 0
    for operation, operand in zip(operations, operands[1:], strict=True):
        prompt += f"{operation}{operand}"
        if operation == "*":
            value *= operand
        else:
            carries += carries_of(value, operation, operand)
            value += operand if operation == "+" else -operand
        if value < 0:
            return None
    meta: dict[str, Any] = {
        "domain": name,
        "operations": "".join(operations),
        "digits": max(len(str(x)) for x in operands),
        "carries": carries,
        "style": style,
    }
    if style == "worked":
        meta["steps"] = working(operands[0], operations[0], operands[1])
    return TaskItem(prompt, str(value), meta, written(operands, operations[0], value, style))


def _operand(chance: random.Random, low: int, high: int) -> int:
    length = chance.randint(low, high)
    return chance.randint(10 ** (length - 1) if length > 1 else 0, 10**length - 1)


def _check(digits: Sequence[Range], operations: str, carries: Range | None, style: Style) -> None:
    if style not in get_args(Style):
        raise PosttrainError(f"arithmetic: style is {style!r}; expected one of {', '.join(get_args(Style))}")
    if not operations or set(operations) - set("+-*"):
        raise PosttrainError(f"arithmetic: operations is {operations!r}; expected symbols out of +-*")
    if len(digits) < 2 or any(not 1 <= low <= high for low, high in digits):
        raise PosttrainError(f"arithmetic: digits is {digits!r}; expected a range for each of two or more operands")
    if len(digits) > 2 and "*" in operations:
        raise PosttrainError("arithmetic: products take two operands; give digits of two, or operations out of +-")
    if carries is not None and "*" in operations:
        raise PosttrainError("arithmetic: carries are counted for sums and differences; leave * out of operations")
    if style == "worked" and (len(digits) > 2 or ("*" in operations and digits[1][1] > 1)):
        raise PosttrainError(
            "arithmetic: working is written for two operands, in products with a second one of one digit; "
            "change digits, or take style terse"
        )
