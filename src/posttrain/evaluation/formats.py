r"""Which of several formats a policy answers in, and how well: what RL makes of a pre-training mixture.

.. math:: p_f = P(\phi(y) = f),\qquad acc_f = P(\text{right} \mid \phi(y) = f),\qquad H = -\sum_f p_f \log p_f

Reference: Echo Chamber, 2025, arXiv 2504.07912 (card 121).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from posttrain.evaluation.evaluation import Evaluation
from posttrain.evaluation.statistics import pass_at_k
from posttrain.reward.shapings.majority import majority
from posttrain.trajectory import PosttrainError

OTHER = "other"
Classifier = Callable[[str], str]  # from a completion to its format, whether or not it is right
Answer = Callable[[str], str | None]  # from a completion to what it answers


@dataclass(frozen=True)
class ByPattern:
    """The first format of which the pattern (a regular expression) occurs in a completion, else `other`."""

    patterns: tuple[tuple[str, str], ...]

    def __call__(self, text: str) -> str:
        return next((name for name, pattern in self.patterns if re.search(pattern, text)), OTHER)


MATHS = ByPattern(
    (
        ("tinygsm", r"def simple_math_problem\(\s*\)"),
        ("openmathinstruct1", r"<llm-code>"),
        ("natural language", r"\\boxed\{|<answer>|####|\b[Aa]nswer\b\**\s*(?::|is\b)"),
    )
)
"""The paper's classes: a Python function, a block of code among words, words that end in an answer."""


@dataclass(frozen=True)
class FormatShares:
    """shares: format to the share of completions in it. accuracy: format to how many of those are right."""

    shares: dict[str, float]
    accuracy: dict[str, float]

    @property
    def entropy(self) -> float:
        """Of the shares, in nats."""
        return -sum(p * math.log(p) for p in self.shares.values() if p > 0)

    @property
    def winner(self) -> str:
        """The format with the largest share, the first in alphabetical order of equals."""
        return min(self.shares, key=lambda name: (-self.shares[name], name))


def format_shares(texts: Sequence[str], correct: Sequence[bool], classify: Classifier) -> FormatShares:
    """Over completions and whether each is right; formats in alphabetical order."""
    if not texts or len(texts) != len(correct):
        raise PosttrainError(f"formats: {len(texts)} texts and {len(correct)} verdicts; expected as many, at least one")
    formats = [classify(text) for text in texts]
    counts = Counter(formats)
    right = Counter(name for name, c in zip(formats, correct, strict=True) if c)
    return FormatShares(
        {name: counts[name] / len(texts) for name in sorted(counts)},
        {name: right[name] / counts[name] for name in sorted(counts)},
    )


def majority_at_k(answers: Sequence[Sequence[str | None]], correct: Sequence[Sequence[bool]], k: int) -> float:
    """How often the most frequent answer of k samples is right, over the prompts' disjoint blocks of k samples.

    Of equally frequent answers the first one wins; samples without an answer (None) do not vote.
    """
    samples = min(map(len, answers), default=0)
    if not 1 <= k <= samples:
        raise PosttrainError(f"majority@k: k={k} of {samples} samples; expected 1 <= k <= samples")
    found = []
    for votes, right in zip(answers, correct, strict=True):
        for start in range(0, len(votes) - k + 1, k):
            block = list(votes[start : start + k])
            winner = majority(block)
            found.append(winner is not None and bool(right[start + block.index(winner)]))
    return sum(found) / len(found)


def format_metrics(
    evaluation: Evaluation,
    classify: Classifier,
    *,
    ks: Sequence[int] = (1,),
    answer: Answer | None = None,
    votes: int | None = None,
) -> dict[str, float]:
    """A checkpoint's row: shares, accuracies and entropy of formats, pass@k, and majority@k, under flat names.

    answer: what a completion answers; without it there is no majority. votes: its k; None: all samples.
    """
    texts = [text for row in evaluation.completions for text in row]
    shares = format_shares(texts, evaluation.correct.ravel().tolist(), classify)
    right = evaluation.correct.sum(axis=1)
    metrics = {f"format/{name}": share for name, share in shares.shares.items()}
    metrics |= {f"format_accuracy/{name}": value for name, value in shares.accuracy.items()}
    metrics["format_entropy"] = shares.entropy
    for k in ks:
        metrics[f"pass@{k}"] = sum(pass_at_k(evaluation.samples, int(c), k) for c in right) / evaluation.n
    if answer is not None:
        k = evaluation.samples if votes is None else votes
        given = [[answer(text) for text in row] for row in evaluation.completions]
        metrics[f"majority@{k}"] = majority_at_k(given, evaluation.correct.tolist(), k)
    return metrics
