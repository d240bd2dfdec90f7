"""The same problems in three answer formats of growing difficulty: a judgement, a choice, an open answer.

Reference: Curr-ReFT, 2025, arXiv 2503.07065 (card 014).
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from posttrain.evaluation.task import Task, TaskItem, without_repeats
from posttrain.reward.answer_formats import FORMATS, InFormat
from posttrain.reward.reward import Reward
from posttrain.trajectory import Finish, PosttrainError, Prompt

Wrong = Callable[[TaskItem, random.Random], str]  # a wrong answer that could be taken for the right one
PROPOSED, OPTIONS = "{proposed}", "{options}"
WORDINGS = {
    "judge": "{question}\nProposed answer: {proposed}\nIs it right? The final answer is exactly 'yes' or 'no'.",
    "choice": "{question}\n{options}\nThe final answer is exactly one of the option letters.",
    "open": "{question}",
}
PATIENCE = 100


def reposed(
    task: Task,
    *,
    options: int = 4,
    wrong: Wrong | None = None,
    wordings: Mapping[str, str] | None = None,
    separator: str = "\n",
    component: str | None = None,
    seed: int = 0,
) -> Task:
    """A task with every training problem three times, once in each format; `meta["format"]` names it.

    Judgements propose the right answer and a wrong one equally often. What is held out keeps its format, which is the
    open one, so that accuracies compare with those of the task itself.

    Args:
        options: letters of a choice, 2 to 5, the right one at a random place; joined by `separator`.
        wrong: makes a wrong answer; None: a number near a whole number, else the answer to another problem.
        wordings: the prompt in each format, with `{question}` and `{proposed}` or `{options}` in it.
        component: of the reward, the one that looks at the answer; None takes the task's metric, or the only one.

    Raises:
        PosttrainError: a training problem without an answer, no wrong answers to be found, a reward whose component is
            not clear.
    """
    if not 2 <= options <= 5:
        raise PosttrainError(f"reposed: options is {options}; expected 2 to 5 letters")
    words = {**WORDINGS, **(wordings or {})}
    if set(words) != set(FORMATS):
        raise PosttrainError(f"reposed: wordings are {', '.join(sorted(words))}; expected {', '.join(FORMATS)}")
    chance = random.Random(f"reposed/{task.name}/{seed}")
    answers = sorted({_right(item) for item in task.train})
    makes = wrong or (lambda item, chance: near(item, chance, answers))
    rights = [i % 2 == 0 for i in range(len(task.train))]
    chance.shuffle(rights)
    items = []
    for item, right in zip(task.train, rights, strict=True):
        items += [
            as_judgement(item, right, makes, words, chance),
            as_choice(item, options, makes, words, separator, chance),
        ]
        items.append(_posed(item, "open", words, item.answer, item.solution))
    chance.shuffle(items)
    return replace(
        task,
        train=without_repeats(items, {item.key for item in task.heldout}),
        heldout=[replace(item, meta={**item.meta, "format": "open"}) for item in task.heldout],
        reward=_scored_by_format(task, component),
        metric=task.metric if task.metric is not None or len(task.reward.components) > 1 else _the_answer(task, None),
        description=f"{task.description or task.name}, in three answer formats",
    )


def as_judgement(
    item: TaskItem, right: bool, wrong: Wrong, words: Mapping[str, str], chance: random.Random
) -> TaskItem:
    """The problem as a judgement of the right answer, or of a wrong one."""
    proposed = _right(item) if right else _different(item, wrong, chance, 1)[0]
    said = "yes" if right else "no"
    return _posed(item, "judge", words, said, said, proposed=proposed)


def as_choice(
    item: TaskItem, count: int, wrong: Wrong, words: Mapping[str, str], separator: str, chance: random.Random
) -> TaskItem:
    """The problem as a choice between `count` answers, the right one at a random place."""
    offered = [_right(item), *_different(item, wrong, chance, count - 1)]
    chance.shuffle(offered)
    lines = [f"{letter}. {each}" for letter, each in zip(string.ascii_uppercase, offered, strict=False)]
    letter = string.ascii_uppercase[offered.index(_right(item))]
    return _posed(item, "choice", words, letter, letter, options=separator.join(lines))


def _posed(
    item: TaskItem, form: str, words: Mapping[str, str], answer: Any, solution: str | None, **filled: str
) -> TaskItem:
    text = words[form].replace("{question}", item.question)
    for name, value in filled.items():
        text = text.replace(f"{{{name}}}", value)
    last = [*item.prompt[:-1], {**item.prompt[-1], "content": text}] if not isinstance(item.prompt, str) else text
    return TaskItem(last, answer, {**item.meta, "format": form}, solution)


def _right(item: TaskItem) -> str:
    """The reference answer, the first where there are several."""
    answer = item.answer[0] if isinstance(item.answer, list | tuple) and item.answer else item.answer
    if answer is None:
        raise PosttrainError(f"reposed: the problem {item.question[:60]!r} has no answer to judge or choose")
    return str(answer)


def _different(item: TaskItem, wrong: Wrong, chance: random.Random, count: int) -> list[str]:
    """Distinct wrong answers."""
    found: list[str] = []
    for _ in range(PATIENCE):
        made = wrong(item, chance)
        if made != _right(item) and made not in found:
            found.append(made)
        if len(found) == count:
            return found
    raise PosttrainError(
        f"reposed: the problem {item.question[:60]!r} has fewer than {count} wrong answers; lower options, or give "
        f"wrong=..."
    )


def near(item: TaskItem, chance: random.Random, answers: list[str]) -> str:
    """A number near a whole number; one of `answers` where the right one is none."""
    try:
        number = int(_right(item))
    except ValueError:
        return chance.choice(answers)
    near = number + chance.choice((-10, -2, -1, 1, 2, 10))
    return str(near if near >= 0 or number < 0 else number + 1)


def _the_answer(task: Task, component: str | None) -> str:
    """The component of the reward that looks at the answer."""
    found = component or task.metric or (next(iter(task.reward.components)) if len(task.reward.components) == 1 else "")
    if found not in task.reward.components:
        raise PosttrainError(
            f"reposed: task {task.name} does not say which part of its reward looks at the answer; give component=, "
            f"one of {', '.join(task.reward.components)}"
        )
    return found


def _scored_by_format(task: Task, component: str | None) -> Reward:
    name = _the_answer(task, component)
    parts = dict(task.reward.components)
    parts[name] = (InFormat(open=_Own(task.reward, name)), parts[name][1])
    return Reward(parts, task.reward.on_error)


@dataclass(frozen=True)
class _Own:
    """A component of the task's own reward."""

    reward: Reward
    name: str

    def __call__(self, completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
        own = Reward({self.name: self.reward.components[self.name]})
        score = own.score(prompt, completion, tokens=tokens, finish=finish)
        if score.errors:
            raise PosttrainError(score.errors[self.name])
        return score.parts[self.name]
