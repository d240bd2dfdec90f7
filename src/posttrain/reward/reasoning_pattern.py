r"""Counting the phrases of reasoning: a reward that does not know the answer (reasoning pattern reward, RPR).

.. math:: \mathrm{RPR} = \max\Big(0, \min(1, c / 20) - \mathrm{rep}_{20} - \#(\text{"user: "})\Big)

`c` phrases of a list occur; `rep` is the number of distinct word 20-grams that occur more than once, over the number of
places where a 20-gram can stand.
Reference: The Climb Carves Wisdom Deeper Than the Summit, 2025, arXiv 2505.22653 (card 079).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from posttrain.reward.extract import find_answer, last_number
from posttrain.trajectory import Finish, PosttrainError, Prompt

MATHS = (
    "i need to", "we need to", "wait", "alternatively", "let me check", "let me see", "let's focus on", "we know that",
    "we can observe", "we can see", "let me try", "let's try", "let us try", "first,", "firstly,", "next,", "finally,",
    "let us first", "let's first", "let me first", "try again", "still not", "not working", "not correct",
    "does not work", "doesn't work", "makes sence", "since we", "because we", "consequently", "as a result", "thus",
    "therefore", "hence", "so that", "thereby", "if we", "given there", "for instance", "for example",
)  # fmt: skip
OPEN_ENDED = (
    *MATHS, "1. ", "2. ", "3. ", "4. ", "step 1", "step 2", "step 3", "step 4", "considering the", "i'll", "i will",
    "i would", "i should",
)  # fmt: skip
LISTS = {"maths": MATHS, "open-ended": OPEN_ENDED}
_EXTRACT: dict[str, Callable[[str], str | None]] = {
    "marked": find_answer,
    "number": last_number,
    "none": lambda text: text,
}


@dataclass(frozen=True)
class ReasoningPattern:
    """The share of `most` phrases that a completion has, less what it repeats, in [0, 1]; a verifier.

    phrases: lower-case; None: the paper's for `kind` (`maths`; `open-ended` has more, and does not mind "user: ").
    words: count only phrases that stand alone. The paper tests for substrings, which "await" and "31. 5" pass too.
    ngram: length in words of what counts as a repetition.
    answer: a completion without one has 0: a `marked` one (`find_answer`), any `number`, or `none` need be there.
    """

    kind: Literal["maths", "open-ended"] = "maths"
    phrases: tuple[str, ...] | None = None
    most: int = 20
    ngram: int = 20
    words: bool = False
    answer: Literal["marked", "number", "none"] = "marked"

    def __post_init__(self) -> None:
        if self.kind not in LISTS or self.answer not in _EXTRACT or min(self.most, self.ngram) < 1:
            raise PosttrainError(
                f"reasoning_pattern: kind={self.kind!r}, answer={self.answer!r}, most={self.most}, ngram={self.ngram}; "
                f"expected {' or '.join(LISTS)}, one of {', '.join(_EXTRACT)}, and numbers from 1"
            )

    def __call__(self, completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
        return self.score(completion) if _EXTRACT[self.answer](completion) is not None else 0.0

    def score(self, text: str) -> float:
        """RPR of a text, whether or not it has an answer."""
        text = text.lower()
        used = min(1.0, self.count(text) / self.most)
        turns = text.count("user: ") if self.kind == "maths" else 0
        return max(0.0, used - repetition(text, self.ngram) - turns)

    def count(self, text: str) -> int:
        """How many of the phrases occur in a lower-case text; each counts once."""
        phrases = LISTS[self.kind] if self.phrases is None else self.phrases
        return sum(bool(_alone(p).search(text)) if self.words else p in text for p in phrases)


def repetition(text: str, n: int) -> float:
    """Distinct word n-grams that occur more than once, over the places of an n-gram; 0 for a text of fewer words."""
    units = text.split()
    places = len(units) - n + 1
    if places < 1:
        return 0.0
    grams = Counter(tuple(units[i : i + n]) for i in range(places))
    return sum(count > 1 for count in grams.values()) / places


def _alone(phrase: str) -> re.Pattern[str]:
    """The phrase where no word goes on at either end."""
    before = r"(?<!\w)" if phrase[:1].isalnum() else ""
    behind = r"(?!\w)" if phrase[-1:].isalnum() else ""
    return re.compile(before + re.escape(phrase) + behind)
