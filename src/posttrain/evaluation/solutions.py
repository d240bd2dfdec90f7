"""Worked solutions of generated arithmetic problems: completions that a small model can learn to imitate."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from posttrain.reward.names import unknown
from posttrain.trajectory import PosttrainError

Entry = Mapping[str, Any]  # a problem of reasoning-gym: question, answer, metadata
Solver = Callable[[Entry], str | None]

_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def answer_line(answer: str) -> str:
    """The answer marked as final; one that spans lines (a grid) is put in `<answer>` tags."""
    return f"<answer>\n{answer}\n</answer>" if "\n" in answer else f"Answer: {answer}"


def running_results(entry: Entry) -> str:
    """A chain of sums, or of products, worked from left to right: "12 + 7 = 19", "19 - 5 = 14", "Answer: 14"."""
    first, *rest = str(entry["metadata"]["expression"]).split()
    result, lines = Decimal(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        following = _OPERATORS[sign](result, Decimal(term))
        lines.append(f"{result} {sign} {term} = {following}")
        result = following
    return "\n".join([*lines, answer_line(str(entry["answer"]))])


def isolate_variable(entry: Entry) -> str | None:
    """A linear equation a·x + b = c solved in two steps: "3*x = 20 - 5 = 15", "x = 15 / 3 = 5", "Answer: 5".

    None where the variable cancelled out: the generator also makes "0 = 0".
    """
    from sympy import Poly, Symbol, sympify

    metadata = entry["metadata"]
    name = str(metadata["variable"])
    left, right = (sympify(side, locals={name: Symbol(name)}) for side in str(metadata["equation"]).split("="))
    left = Poly(left, Symbol(name))
    if left.degree() != 1:
        return None
    slope, constant = left.all_coeffs()
    product, lines = right - constant, []
    scaled = name if slope == 1 else f"{slope}*{name}"
    if constant != 0:
        lines.append(f"{scaled} = {right} {'-' if constant > 0 else '+'} {abs(constant)} = {product}")
    if slope != 1:
        lines.append(f"{name} = {product} / {slope} = {product / slope}")
    return "\n".join([*lines, answer_line(str(entry["answer"]))])


STEPS: dict[str, Solver] = {
    "chain_sum": running_results,
    "decimal_chain_sum": running_results,
    "products": running_results,
    "simple_equations": isolate_variable,
}


def solver(task: str, solution: str | Solver) -> Solver:
    """What writes a problem's demonstration: "answer" (the marked answer alone), "steps" (`STEPS`) or a callable.

    Problems without a stored answer (some tasks have many right ones) get None from "answer".
    """
    if callable(solution):
        return solution
    if solution == "steps":
        if task not in STEPS:
            raise PosttrainError(
                f'no worked steps are known for {task} (known: {", ".join(STEPS)}); use solution="answer" or a callable'
            )
        return STEPS[task]
    if solution != "answer":
        raise unknown("solution", solution, ("answer", "steps"))
    return lambda entry: None if entry["answer"] is None else answer_line(str(entry["answer"]))
