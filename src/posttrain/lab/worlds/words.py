"""Word problems as graphs of quantities: how deep a problem is and in which words it stands vary independently.

    a:3;b:a+4;c:b-a;c?      the prompt, in the plain context
    a+4=b:7;b-a=c:4;4       the solution: a line a quantity that must be computed, then the answer

Arithmetic is modulo `modulus`, so that values stay short and difficulty is the depth alone. In the manner of The
Interplay of Pre-Training, Mid-Training, and RL, 2025, arXiv 2512.07783 (card 144).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.evaluation.task import TaskItem
from posttrain.lab.worlds.arithmetic import Range
from posttrain.lab.worlds.world import WorldTask, world_task
from posttrain.reward.reward import Reward
from posttrain.trajectory import Finish, PosttrainError, Prompt

OPERATORS = "+-*"
_LINE = re.compile(r"(\w+)[+*-](\w+)=(\w+):(\d+)")


@dataclass(frozen=True)
class Context:
    """names: of the quantities. definition, question: how one is given and asked for (`{name}`, `{value}`)."""

    names: tuple[str, ...]
    definition: str
    question: str


CONTEXTS: dict[str, Context] = {
    "plain": Context(tuple("abcdefghjkmnpqrs"), "{name}:{value};", "{name}?"),
    "zoo": Context(
        ("ant", "bat", "cat", "doe", "eel", "fox", "gnu", "hen", "ibis", "jay", "koi", "lynx"),
        "{name} is {value}, ",
        "so {name}?",
    ),
    "school": Context(
        ("art", "book", "chalk", "desk", "exam", "form", "grade", "hall", "ink", "job", "key", "lab"),
        "[{name}:{value}]",
        "what {name}?",
    ),
    "films": Context(tuple("ABCDEFGHJKLM"), "{value}>{name} ", "{name}!"),
}


def words(
    *,
    depth: Range = (2, 4),
    contexts: Sequence[str] = ("plain",),
    distractors: Range = (0, 0),
    modulus: int = 10,
    operations: str = "+-",
    shuffled: bool = False,
    process: float = 0.0,
    by: Literal["depth", "context"] = "depth",
    train: int = 2000,
    heldout: int = 200,
    seed: int = 0,
    name: str = "words",
) -> WorldTask:
    """Quantities defined by each other, one of which is asked for; every computed one but the distractors is needed.

    Args:
        depth: the fewest and most operations of a problem. contexts: names out of CONTEXTS, drawn evenly.
        distractors: definitions that the answer does not depend on. shuffled: definitions in any order.
        operations: the operators to draw from, out of `+-*`.
        process: the share of the reward that right steps earn, `(1 - process) answer + process * answer * steps`, where
            `steps` is the card's process reward; 0 is the outcome alone, 0.8 the card's.
        by: what `meta["domain"]` names: `op3`, or the context.

    Components: `answer`; `process`, the process reward where the answer is right, else 0; with weight 0 `steps`, the
    share of quantities computed right, from the right ones, and `verified`, whether all are and the answer is.
    `meta`: domain, depth, context, distractors, graph (name to parents and value, of the quantities to compute).
    """
    unknown = [c for c in contexts if c not in CONTEXTS]
    if unknown or not contexts:
        raise PosttrainError(f"words: contexts is {list(contexts)}; expected some of {', '.join(CONTEXTS)}")
    most = depth[1] + distractors[1] + 2
    room = min(len(CONTEXTS[c].names) for c in contexts)
    if not 1 <= depth[0] <= depth[1] or not 0 <= distractors[0] <= distractors[1] or most > room:
        raise PosttrainError(
            f"words: depth {depth} with distractors {distractors} takes {most} names; expected ranges of depth from 1, "
            f"and at most {room} names in contexts {list(contexts)}"
        )
    if not operations or set(operations) - set(OPERATORS) or modulus < 2 or not 0 <= process <= 1:
        raise PosttrainError(
            f"words: operations={operations!r}, modulus={modulus}, process={process}; expected symbols out of "
            f"{OPERATORS}, a modulus from 2 and a share from 0 to 1"
        )

    def draw(chance: random.Random) -> TaskItem:
        context = chance.choice(list(contexts))
        operators, extra = chance.randint(*depth), chance.randint(*distractors)
        problem = _graph(chance, CONTEXTS[context], operators, extra, modulus, operations)
        lines = problem.definitions
        if shuffled:
            chance.shuffle(lines)
        wording = CONTEXTS[context]
        prompt = "".join(wording.definition.format(name=n, value=v) for n, v in lines)
        meta = {
            "domain": f"op{operators}" if by == "depth" else context,
            "depth": operators,
            "context": context,
            "distractors": extra,
            "graph": problem.graph,
        }
        prompt += wording.question.format(name=problem.asked)
        return TaskItem(prompt, str(problem.graph[problem.asked]["value"]), meta, problem.solution)

    return world_task(
        name,
        draw,
        Reward(
            {
                "answer": (answer_score, 1.0 - process),
                "process": (process_score, process),
                "steps": (steps_score, 0.0),
                "verified": (verified_score, 0.0),
            }
        ),
        train=train,
        heldout=heldout,
        seed=seed,
        max_tokens=max(
            (3 * max(map(len, CONTEXTS[c].names)) + 3 + len(str(modulus - 1))) * (depth[1] + 1) for c in contexts
        ),
        description=f"{depth[0]} to {depth[1]} operations modulo {modulus}, told as {', '.join(contexts)}",
    )


@dataclass(slots=True)
class _Problem:
    definitions: list[tuple[str, str]]  # name and what it is, in an order in which each builds on earlier ones
    graph: dict[str, dict[str, Any]]
    asked: str
    solution: str


def _graph(
    chance: random.Random, context: Context, depth: int, distractors: int, modulus: int, operations: str
) -> _Problem:
    """A chain from a given quantity to the asked one, whose links look back at earlier quantities as well."""
    names = chance.sample(context.names, depth + distractors + 1)
    values = {names[0]: chance.randrange(modulus)}
    definitions = [(names[0], str(values[names[0]]))]
    graph: dict[str, dict[str, Any]] = {}
    lines = []
    last = names[0]
    needed = [names[0]]
    places = sorted(chance.sample(range(depth + distractors), distractors))
    for i, name in enumerate(names[1:]):
        aside = i in places
        left = chance.choice(needed) if aside else last
        others = [n for n in needed if n != left]
        right = chance.choice(others) if others and chance.random() < 0.5 else str(chance.randrange(1, modulus))
        operator = chance.choice(operations)
        values[name] = _apply(operator, _value(left, values), _value(right, values)) % modulus
        definitions.append((name, f"{left}{operator}{right}"))
        if not aside:
            parents = sorted({n for n in (left, right) if n in values})
            graph[name] = {"parents": parents, "value": values[name]}
            lines.append(f"{left}{operator}{right}={name}:{values[name]}")
            needed.append(name)
            last = name
    return _Problem(definitions, graph, last, ";".join([*lines, str(values[last])]))


def _value(term: str, values: dict[str, int]) -> int:
    return values[term] if term in values else int(term)


def _apply(operator: str, a: int, b: int) -> int:
    return a + b if operator == "+" else a - b if operator == "-" else a * b


# -- the verifier ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """What a solution does, held against the graph.

    values, dependencies: quantities with another value, or from others than theirs. missing, extra: lines left out, and
    lines too many (what cannot be read counts as such). size: quantities of the graph. answer: whether it is right.
    sound: quantities that are there, right and from the right ones.
    """

    values: int
    dependencies: int
    missing: int
    extra: int
    size: int
    answer: bool
    sound: int

    @property
    def process(self) -> float:
        """The card's process reward: 1 without a mistake, less 1/size for each, at least 0."""
        mistakes = self.values + self.dependencies + self.missing + min(self.extra, self.size) + (not self.answer)
        return max(0.0, 1 - mistakes / self.size)


def check(completion: str, prompt: Prompt) -> Check:
    """Read a solution line by line and compare it with the problem's graph."""
    graph: dict[str, dict[str, Any]] = prompt.meta["graph"]
    *lines, answer = completion.strip().split(";")
    seen: dict[str, tuple[list[str], int]] = {}
    extra = 0
    for line in lines:
        found = _LINE.fullmatch(line.strip())
        if found is None or found[3] not in graph or found[3] in seen:
            extra += 1
        else:
            parents = sorted({term for term in (found[1], found[2]) if not term.isdigit()})
            seen[found[3]] = parents, int(found[4])
    wrong = [graph[n]["value"] != v for n, (_, v) in seen.items()]
    astray = [graph[n]["parents"] != p for n, (p, _) in seen.items()]
    return Check(
        values=sum(wrong),
        dependencies=sum(astray),
        missing=len(graph) - len(seen),
        extra=extra,
        size=len(graph),
        answer=answer.strip() == prompt.answer,
        sound=sum(not a and not b for a, b in zip(wrong, astray, strict=True)),
    )


def answer_score(completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
    """1 where the answer is right, whatever leads to it."""
    return float(check(completion, prompt).answer)


def process_score(completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
    """The process reward of a solution whose answer is right, else 0."""
    found = check(completion, prompt)
    return found.process if found.answer else 0.0


def steps_score(completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
    """Share of the quantities that are computed right, from the right ones."""
    found = check(completion, prompt)
    return found.sound / found.size


def verified_score(completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
    """1 where every quantity and the answer are right."""
    found = check(completion, prompt)
    return float(found.answer and found.sound == found.size)
