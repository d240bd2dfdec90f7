"""Verifiers: rewards computed by rule from a completion and its prompt; their names stand in `catalogue.py`.

A verifier is called `verifier(completion, prompt, *, tokens, finish) -> float`: the completion's text, the `Prompt` it
answers, its length in tokens (the end token included) and why it ended. What a verifier cannot judge (a prompt without
a reference answer, a reference it cannot read) it raises; `reward.Reward` catches and counts that.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from posttrain.reward.extract import as_number, extract_answer, find_answer, last_number
from posttrain.reward.names import unknown
from posttrain.trajectory import Finish, PosttrainError, Prompt


class Verifier(Protocol):
    """What scores a completion; see the module's docstring."""

    def __call__(self, completion: str, prompt: Prompt, *, tokens: int, finish: Finish) -> float: ...


def references(prompt: Prompt) -> list[str]:
    """The reference answers of `prompt` as text; a list or tuple in `prompt.answer` holds alternatives."""
    if prompt.answer is None:
        raise PosttrainError(f"prompt {prompt.question[:60]!r} has no reference answer to compare with")
    answers = prompt.answer if isinstance(prompt.answer, list | tuple) else [prompt.answer]
    return [str(answer) for answer in answers]


def _check_pattern(verifier: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise PosttrainError(f"{verifier}: pattern {pattern!r} is not a regular expression: {error}") from error


@dataclass(frozen=True)
class ExactMatch:
    """1 where the completion's answer (the marked one, else the whole text) equals the reference, else 0.

    ignore_case: compare without regard to case.
    strip: ignore white space around the answer, and one full stop after it.
    normalise_numbers: two plain numbers are equal when their values are ("1,000.0" and "1000").
    """

    ignore_case: bool = False
    strip: bool = True
    normalise_numbers: bool = True

    def __call__(self, completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
        marked = find_answer(completion)
        answer = completion if marked is None else marked
        candidates = [answer, answer.strip().removesuffix(".")] if self.strip else [answer]
        return float(any(self.equal(c, reference) for c in candidates for reference in references(prompt)))

    def equal(self, answer: str, reference: str) -> bool:
        """Whether the two answers are the same under these rules."""
        if self.normalise_numbers:
            a, b = as_number(answer), as_number(reference)
            if a is not None and b is not None:
                return a == b
        if self.strip:
            answer, reference = answer.strip(), reference.strip()
        return answer.casefold() == reference.casefold() if self.ignore_case else answer == reference


@dataclass(frozen=True)
class LastNumber:
    """1 where the last number of the completion equals the reference number (the rule of GSM8K), else 0.

    Thousands commas and currency signs are dropped; a marked answer ("####", "Answer:", a box or tag) goes first.
    """

    def __call__(self, completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
        marked = find_answer(completion)
        found = last_number(completion if marked is None else marked)
        values = [as_number(reference) for reference in references(prompt)]
        if None in values:
            raise PosttrainError(f"last_number: the reference answer {prompt.answer!r} is no number; try exact_match")
        return float(found is not None and as_number(found) in values)


@dataclass(frozen=True)
class Contains:
    """1 where the completion contains `text` (or the reference answer, where `text` is None), else 0."""

    text: str | None = None
    ignore_case: bool = False

    def __call__(self, completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
        wanted = references(prompt) if self.text is None else [self.text]
        if self.ignore_case:
            completion, wanted = completion.casefold(), [w.casefold() for w in wanted]
        return float(any(w in completion for w in wanted))


@dataclass(frozen=True)
class Regex:
    """1 where `pattern` occurs in the completion; with `group`, where the last occurrence's group is the reference.

    group: number or name of the group that holds the answer; it is compared as `ExactMatch()` compares.
    """

    pattern: str
    group: int | str | None = None

    def __post_init__(self) -> None:
        _check_pattern("regex", self.pattern)
        compiled = re.compile(self.pattern)
        if self.group is not None and self.group not in {*range(compiled.groups + 1), *compiled.groupindex}:
            raise PosttrainError(f"regex: pattern {self.pattern!r} has no group {self.group!r}")

    def __call__(self, completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
        if self.group is None:
            return float(re.search(self.pattern, completion) is not None)
        wanted = references(prompt)
        matches = list(re.finditer(self.pattern, completion))
        found = matches[-1].group(self.group) if matches else None
        return float(found is not None and any(ExactMatch().equal(found, reference) for reference in wanted))


@dataclass(frozen=True)
class Format:
    """1 where the whole completion (stripped; "." also matches line ends) matches `pattern`, else 0.

    The default asks for reasoning in `<think>` tags followed by an answer in `<answer>` tags.
    """

    pattern: str = r"<think>.*?</think>\s*<answer>.*?</answer>"

    def __post_init__(self) -> None:
        _check_pattern("format", self.pattern)

    def __call__(self, completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
        return float(re.fullmatch(self.pattern, completion.strip(), re.DOTALL) is not None)


@dataclass(frozen=True)
class Length:
    """1 where the completion is at most `maximum` tokens (or characters) long, else 0."""

    maximum: int
    unit: Literal["tokens", "characters"] = "tokens"

    def __post_init__(self) -> None:
        if self.maximum < 1 or self.unit not in ("tokens", "characters"):
            raise PosttrainError(
                f"length: got maximum={self.maximum!r}, unit={self.unit!r}; expected at least 1, tokens or characters"
            )

    def __call__(self, completion: str, prompt: Prompt, *, tokens: int, finish: Finish = "none") -> float:
        return float((tokens if self.unit == "tokens" else len(completion)) <= self.maximum)


@dataclass(frozen=True)
class OverlongPenalty:
    r"""Soft overlong punishment (DAPO, 2025, arXiv 2503.14476), in [-1, 0].

    0 up to `max_tokens - buffer` tokens, then linearly down to -1 at `max_tokens`, and -1 beyond.
    """

    max_tokens: int
    buffer: int

    def __post_init__(self) -> None:
        if not 0 < self.buffer <= self.max_tokens:
            raise PosttrainError(
                f"overlong: buffer={self.buffer!r}, max_tokens={self.max_tokens!r}; expected 0 < buffer <= max_tokens"
            )

    def __call__(self, completion: str, prompt: Prompt, *, tokens: int, finish: Finish = "none") -> float:
        return -min(1.0, max(0.0, (tokens - (self.max_tokens - self.buffer)) / self.buffer))


@dataclass(frozen=True)
class MathVerify:
    r"""1 where `math-verify` finds the completion's answer mathematically equal to the reference, else 0.

    A marked answer (`find_answer`) is judged alone; without one, the library searches the completion. References and
    answers need no `\boxed{}` and no LaTeX. The library's time limit works by signals, which Python delivers to the
    main thread only: in any other thread it runs without a limit (and says so once in the log).

    timeout: whole seconds for parsing and for comparing one expression.
    """

    timeout: int = 5

    def __call__(self, completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
        from math_verify import verify

        limit = self.timeout if threading.current_thread() is threading.main_thread() else None
        wanted = []
        for reference in references(prompt):
            prose = re.fullmatch(r"[A-Za-z .,'-]*[A-Za-z]{3}[A-Za-z .,'-]*", reference)  # else "Paris" is P·a·r·i·s
            parsed = [] if prose else self._parse(reference, limit)
            if not parsed:
                raise PosttrainError(f"math_verify cannot read the reference answer {reference!r}; try exact_match")
            wanted.append(parsed)
        marked = find_answer(completion)
        given = self._parse(completion, limit, search=True) if marked is None else self._parse(marked, limit)
        return float(any(verify(gold, given, timeout_seconds=limit) for gold in wanted))

    @staticmethod
    def _parse(text: str, limit: int | None, search: bool = False) -> list[Any]:
        r"""Expressions in `text`; a bare one is boxed first, because outside LaTeX only numbers are looked for."""
        from math_verify import parse

        words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", text)
        marked = any(sign in text for sign in ("$", r"\boxed", r"\(", r"\["))
        expression = not (search or marked or len(words) > 1)
        return list(parse(rf"\boxed{{{text}}}" if expression else text, parsing_timeout=limit))


@dataclass(frozen=True)
class ReasoningGym:
    """The score in [0, 1] that a `reasoning-gym` task gives the completion's answer.

    That is the marked answer (`find_answer`), else the last number where the stored answer is a number ("7 + 5 = 12"
    is an answer, though its form is not the asked one), else the whole text.
    The entry (question, answer, metadata) is read from `prompt.meta["entry"]`.

    task: registered name; None takes it from the entry's metadata.
    config: the task's settings, for the few tasks whose scorer depends on them.
    """

    task: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    _scorers: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.task is not None:
            self._scorer(self.task)

    def __call__(self, completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
        entry = prompt.meta.get("entry")
        if entry is None:
            raise PosttrainError('reasoning_gym: the prompt has no meta["entry"]; build its prompts from a Task')
        scorer = self._scorer(self.task or str(entry["metadata"].get("source_dataset")))
        answer = extract_answer(completion)
        if find_answer(completion) is None and as_number(str(entry["answer"])) is not None:
            answer = last_number(completion) or answer
        return float(scorer.score_answer(answer, entry))

    def _scorer(self, task: str) -> Any:
        """The task's data set, made once: some read word lists or images when they are made."""
        from reasoning_gym.factory import DATASETS, create_dataset

        if task not in DATASETS:
            raise unknown("reasoning-gym task", task, DATASETS)
        if task not in self._scorers:
            self._scorers[task] = create_dataset(task, **{"seed": 0, "size": 1, **self.config})
        return self._scorers[task]
