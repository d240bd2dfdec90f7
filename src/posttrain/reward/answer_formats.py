"""Verifiers of one problem's answer in several formats: a judgement (yes or no), a choice (letters), an open answer.

Each looks at the marked answer (`<answer>...</answer>`, "Answer: ...") and without one at the whole completion.
Reference: Curr-ReFT, 2025, arXiv 2503.07065 (card 014).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from posttrain.reward.extract import extract_answer
from posttrain.reward.verifiers import ExactMatch, MathVerify, Verifier, references
from posttrain.trajectory import Finish, PosttrainError, Prompt

T = TypeVar("T")
FORMATS = ("judge", "choice", "open")
Box = tuple[float, float, float, float]
_YES = re.compile(r"\b(?:yes|true|correct)\b", re.IGNORECASE)
_NO = re.compile(r"\b(?:no|false|incorrect)\b", re.IGNORECASE)
_LETTER = re.compile(r"\b[A-E]\b")
_NUMBER = r"-?\d+(?:\.\d+)?"
_BOX = re.compile(r"\[\s*" + r"\s*,\s*".join([f"({_NUMBER})"] * 4) + r"\s*\]")
_WORD = re.compile(r"[^\W_]+(?:[.,]\d+)*")


def judgement(text: str) -> bool | None:
    """True for a yes, False for a no; None for neither and for both."""
    yes, no = _YES.search(text) is not None, _NO.search(text) is not None
    return None if yes == no else yes


def letters(text: str) -> tuple[str, ...]:
    """The distinct letters A to E that stand alone, in their order."""
    return tuple(dict.fromkeys(_LETTER.findall(text)))


def overlap(first: Box, second: Box) -> float:
    """Intersection over union of two boxes [left, top, right, bottom], in [0, 1]; 0 where a box has no area."""
    area = [max(0.0, b[2] - b[0]) * max(0.0, b[3] - b[1]) for b in (first, second)]
    wide = max(0.0, min(first[2], second[2]) - max(first[0], second[0]))
    high = max(0.0, min(first[3], second[3]) - max(first[1], second[1]))
    union = sum(area) - wide * high
    return wide * high / union if union > 0 else 0.0


@dataclass(frozen=True)
class YesNo:
    """1 where the answer is the reference's judgement (yes, true, correct; no, false, incorrect), else 0."""

    def __call__(self, completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
        gold = _gold(prompt, judgement, "yes or no")
        return float(judgement(extract_answer(completion)) == gold)


@dataclass(frozen=True)
class OptionLetters:
    """1 where the answer's letters (A to E, distinct, in order) are the reference's, else 0: "C, A" is not "A, C"."""

    def __call__(self, completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
        gold = _gold(prompt, letters, "letters from A to E")
        return float(letters(extract_answer(completion)) == gold)


@dataclass(frozen=True)
class LabelOverlap:
    """Labels in common over labels in all, between the answer and the reference, each split at commas and spaces."""

    def __call__(self, completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
        given = frozenset(_labels(extract_answer(completion)))
        gold = frozenset(label for text in references(prompt) for label in _labels(text))
        return len(given & gold) / len(given | gold) if given | gold else 0.0


@dataclass(frozen=True)
class BoxMatch:
    """1 where the first box [left, top, right, bottom] of the answer overlaps the reference's by more than `threshold`
    (intersection over union), else 0; the overlap itself where `soft`.

    formed: also the answer must hold it as JSON-like text, within braces.
    """

    threshold: float = 0.5
    soft: bool = False
    formed: bool = False

    def __call__(self, completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
        gold = _gold(prompt, _box, "a box [left, top, right, bottom]")
        answer = extract_answer(completion)
        found = _box(answer)
        if found is None or (self.formed and not re.search(r"\{.*\[.*\].*\}", answer, re.DOTALL)):
            return 0.0
        return overlap(found, gold) if self.soft else float(overlap(found, gold) > self.threshold)


@dataclass(frozen=True)
class OpenAnswer:
    """1 where the answer is the reference: as mathematics, as the same text, or as the one number or name in a sentence
    ("it is 3 apples" for "3"; never "12" for "1", nor "2 or 3" for "3"), else 0.
    """

    def __call__(self, completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
        if ExactMatch(ignore_case=True)(completion, prompt):
            return 1.0
        words = [word.casefold() for word in _WORD.findall(extract_answer(completion))]
        for reference in references(prompt):
            gold = [word.casefold() for word in _WORD.findall(reference)]
            places = [i for i in range(len(words)) if gold and words[i : i + len(gold)] == gold]
            others = words[: places[0]] + words[places[0] + len(gold) :] if len(places) == 1 else words
            if len(places) == 1 and not any(any(c.isdigit() for c in word) for word in others):
                return 1.0
        try:
            # marked, so that it is read as one expression: of "2 or 3" the last number would be found otherwise
            return MathVerify()(f"<answer>{extract_answer(completion)}</answer>", prompt)
        except PosttrainError:  # a reference that is no mathematics
            return 0.0


@dataclass(frozen=True)
class InFormat:
    """The verifier of the format that a prompt's `meta[by]` names: `judge`, `choice`, else (`open`) the one given."""

    open: Verifier = field(default_factory=OpenAnswer)
    by: str = "format"

    def __call__(self, completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
        form = prompt.meta.get(self.by, "open")
        if form not in FORMATS:
            raise PosttrainError(f"in_format: meta[{self.by!r}] is {form!r}; expected one of {', '.join(FORMATS)}")
        scorers: dict[str, Verifier] = {"judge": YesNo(), "choice": OptionLetters(), "open": self.open}
        return scorers[form](completion, prompt, tokens=tokens, finish=finish)


def _gold(prompt: Prompt, read: Callable[[str], T | None], expected: str) -> T:
    reference = references(prompt)[0]
    found = read(reference)
    if found is None or found == ():
        raise PosttrainError(f"the reference answer {reference!r} is none in this format; expected {expected}")
    return found


def _labels(text: str) -> Sequence[str]:
    return [part.casefold() for part in re.split(r"[,\s]+", text.strip()) if part]


def _box(text: str) -> Box | None:
    found = _BOX.search(text)
    if found is None:
        return None
    left, top, right, bottom = (float(x) for x in found.groups())
    return left, top, right, bottom
