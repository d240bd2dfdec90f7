"""Judges of whether two texts say the same: by answer, by text, by words, or learned from labelled pairs.

A judge is called with all pairs at once, so that one that runs a model can batch them.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from posttrain.reward.extract import extract_answer
from posttrain.reward.names import unknown
from posttrain.reward.verifiers import ExactMatch
from posttrain.trajectory import PosttrainError

Pair = tuple[str, str]
Judge = Callable[[Sequence[Pair]], Sequence[bool]]
JudgeName = Literal["answer", "text", "words"]


@dataclass(frozen=True)
class SameAnswer:
    """The same where the final answers are equal, as `ExactMatch` compares them, however they were reached."""

    ignore_case: bool = False

    def __call__(self, pairs: Sequence[Pair]) -> list[bool]:
        equal = ExactMatch(self.ignore_case).equal
        return [equal(extract_answer(a), extract_answer(b)) for a, b in pairs]


@dataclass(frozen=True)
class SameText:
    """The same where the texts are equal but for case, punctuation and white space."""

    def __call__(self, pairs: Sequence[Pair]) -> list[bool]:
        return [_words(a) == _words(b) for a, b in pairs]


@dataclass(frozen=True)
class SharedWords:
    """The same where the distinct words that both have are at least `share` of the longer text's words.

    This is DARLING's rule for texts of at most five words (2025, arXiv 2509.02534, card 071).
    """

    share: float = 0.5

    def __call__(self, pairs: Sequence[Pair]) -> list[bool]:
        found = []
        for a, b in pairs:
            left, right = _words(a), _words(b)
            found.append(len(set(left) & set(right)) >= self.share * max(len(left), len(right)))
        return found


@dataclass(frozen=True)
class LearnedSame:
    """A logistic classifier of pairs by how much of their character n-grams, for each n up to `longest`, they share.

    weights: one for each n, the bias last; `fit` finds them. threshold: the probability above which two are the same:
    calibrate it on pairs that were not fitted, since one that is too low puts all texts into one class.
    """

    weights: tuple[float, ...]
    longest: int = 3
    threshold: float = 0.5

    @classmethod
    def fit(
        cls, pairs: Sequence[Pair], same: Sequence[bool], *, longest: int = 3, threshold: float = 0.5
    ) -> LearnedSame:
        """Maximum likelihood on labelled pairs, with a weak quadratic penalty; deterministic."""
        if len(pairs) != len(same) or len(set(same)) < 2:
            raise PosttrainError(
                f"a classifier of pairs needs a label for each, of both kinds; got {len(pairs)} pairs and "
                f"{len(same)} labels, {sum(map(bool, same))} of them true"
            )
        features = _overlaps(pairs, longest)
        labels = torch.tensor(same, dtype=torch.float64)
        weights = torch.zeros(longest + 1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            value = torch.nn.functional.binary_cross_entropy_with_logits(features @ weights, labels)
            value = value + 1e-3 * weights.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        return cls(tuple(weights.detach().tolist()), longest, threshold)

    def probability(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """`[pairs]` float64 probability that a pair is the same."""
        return torch.sigmoid(_overlaps(pairs, self.longest) @ torch.tensor(self.weights, dtype=torch.float64))

    def __call__(self, pairs: Sequence[Pair]) -> list[bool]:
        return [p > self.threshold for p in self.probability(pairs).tolist()] if pairs else []


JUDGES: dict[str, Judge] = {"answer": SameAnswer(), "text": SameText(), "words": SharedWords()}


def judge_from(given: str | Judge) -> Judge:
    """A judge by its name (`answer`, `text`, `words`), or the callable that was given."""
    if not isinstance(given, str):
        return given
    if given not in JUDGES:
        raise unknown("judge of sameness", given, JUDGES, where="; your own: a callable of a list of pairs of texts")
    return JUDGES[given]


def _words(text: str) -> list[str]:
    return re.findall(r"[\w.+*/=<>-]+", text.lower())


def _overlaps(pairs: Sequence[Pair], longest: int) -> torch.Tensor:
    """`[pairs, longest + 1]`: Dice coefficients of the character n-grams, and 1 for the bias."""
    rows = [[*(_dice(_grams(a, n), _grams(b, n)) for n in range(1, longest + 1)), 1.0] for a, b in pairs]
    return torch.tensor(rows, dtype=torch.float64)


@functools.lru_cache(maxsize=4096)
def _grams(text: str, n: int) -> Counter[str]:
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))


def _dice(a: Counter[str], b: Counter[str]) -> float:
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 1.0
