"""Whether test items stand in the training text: verbatim 8-gram cover, as in the Tülu 3 recipe, and exact copies.

For a test item of tokens ``q_1 .. q_m`` and a training text ``d``, the cover is the share of the item's tokens that lie
inside an n-gram which ``d`` holds verbatim; the item's score is its largest cover over all training texts, and it is
contaminated where the score exceeds one half. (Tülu 3, 2024, arXiv 2411.15124.)
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from posttrain.trajectory import PosttrainError

SEPARATORS = re.compile(r'[\s,.?!:;()"\\-]+')  # not + * / = ^: operators tell one sum from another


@dataclass(frozen=True, slots=True)
class Overlap:
    """What of the test items stands in the training texts; all lists are parallel to the test items.

    score: largest cover over the training texts, from 0 to 1 (0 for items shorter than an n-gram).
    nearest: the training text of that cover; -1 where there is none.
    exact: whether a training text is the same but for case, white space and punctuation.
    threshold: the score above which an item is contaminated.
    """

    score: list[float]
    nearest: list[int]
    exact: list[bool]
    threshold: float

    @property
    def contaminated(self) -> list[int]:
        """The test items that stand in the training texts."""
        return [i for i, score in enumerate(self.score) if self.exact[i] or score > self.threshold]

    def summary(self) -> str:
        """One line: `3 of 200 test items (1.5 %) stand in the training text, 2 of them as exact copies`."""
        found = self.contaminated
        share = 100 * len(found) / len(self.score)
        text = f"{len(found):,} of {len(self.score):,} test items ({share:.1f} %) stand in the training text"
        return f"{text}, {sum(self.exact):,} of them as exact copies" if found else text


def overlap(train_texts: Iterable[str], test_texts: Sequence[str], n: int = 8, *, threshold: float = 0.5) -> Overlap:
    """Look for test items in training texts.

    Args:
        train_texts: one text a user turn (or document); read once.
        test_texts: the held-out items.
        n: tokens of an n-gram.
        threshold: the cover above which an item counts as contaminated.

    Raises:
        PosttrainError: no test items, or n below 1.
    """
    if not test_texts or n < 1:
        raise PosttrainError(f"overlap: {len(test_texts)} test items and n={n}; expected at least one item and n >= 1")
    tests = [_tokens(text) for text in test_texts]
    places: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
    whole: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for item, tokens in enumerate(tests):
        whole[tokens].append(item)
        for start in range(len(tokens) - n + 1):
            places[tokens[start : start + n]].append((item, start))
    score, nearest, exact = [0.0] * len(tests), [-1] * len(tests), [False] * len(tests)
    for document, text in enumerate(train_texts):
        tokens = _tokens(text)
        for item in whole.get(tokens, ()):
            exact[item] = True
        covered: dict[int, set[int]] = defaultdict(set)
        for gram in {tokens[i : i + n] for i in range(len(tokens) - n + 1)}:
            for item, start in places.get(gram, ()):
                covered[item].update(range(start, start + n))
        for item, positions in covered.items():
            cover = len(positions) / len(tests[item])
            if cover > score[item]:
                score[item], nearest[item] = cover, document
    return Overlap(score, nearest, exact, threshold)


def _tokens(text: str) -> tuple[str, ...]:
    return tuple(token for token in SEPARATORS.split(text.lower()) if token)
