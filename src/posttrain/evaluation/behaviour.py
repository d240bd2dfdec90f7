"""What a policy does beside being right: how long it writes, whether it is cut off, and how it reasons.

Averages of length hide what happens at the limit: a policy that runs on until it is cut off and one that reasons for
longer look alike. So the length of what ended by itself stands beside the share of what did not.
Reference: SimpleRL-Zoo, 2025, arXiv 2503.18892 (card 100).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from posttrain.evaluation.evaluation import Evaluation
from posttrain.evaluation.statistics import pass_at_k
from posttrain.trajectory import PosttrainError

Alarm = Literal["degenerate growth", "collapse"]
PHRASES: Mapping[str, tuple[str, ...]] = {
    "backtracking": (
        r"\bwait\b", r"\bgo back\b", r"\btry (?:again|another|a different)\b",
        r"\b(?:was|is|that's) (?:wrong|a mistake)\b", r"\blet me (?:re(?:consider|think|do)|start over)\b",
    ),
    "verification": (
        r"\b(?:let me|let's|let us|to) (?:check|verify|double[- ]check|confirm)\b", r"\bverif(?:y|ying|ication)\b",
        r"\bchecking\b", r"\bplug(?:ging)? (?:it |this |that )?back\b",
    ),
    "subgoals": (
        r"\b(?:first|next|then),? (?:we|i|let)\b", r"\bstep \d", r"\bbreak (?:it|this|the problem) (?:down|into)\b",
        r"\bto (?:do|find|solve) this, (?:we|i) (?:first|need)\b",
    ),
    "enumeration": (
        r"\bcase \d", r"\b(?:try|test|check)(?:ing)? (?:each|all|every)\b", r"\blist(?:ing)? (?:all|out|the)\b",
        r"\bone by one\b",
    ),
}  # fmt: skip


class Judge(Protocol):
    """Which behaviours a response shows. One judge, with one prompt, for all checkpoints that are compared."""

    def __call__(self, question: str, response: str) -> Collection[str]: ...


@dataclass(frozen=True)
class PhraseJudge:
    """Behaviours by the phrases (regular expressions, case ignored) that give them away.

    A stand-in for the language model that the paper asks: it finds words, not what is done with them, so its rates are
    comparable among checkpoints of one model at best.
    """

    phrases: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict(PHRASES), hash=False)

    def __call__(self, question: str, response: str) -> Collection[str]:
        return [
            name
            for name, patterns in self.phrases.items()
            if any(re.search(pattern, response, re.IGNORECASE) for pattern in patterns)
        ]

    @property
    def behaviours(self) -> tuple[str, ...]:
        return tuple(self.phrases)


@dataclass(frozen=True)
class Lengths:
    """mean: tokens a completion. stopped: tokens of a completion that ended by itself (NaN where none did).
    truncated: the share that was cut off at the limit."""

    mean: float
    stopped: float
    truncated: float


def lengths(tokens: Sequence[int], stopped: Sequence[bool]) -> Lengths:
    """Of completions of so many tokens, of which some ended by themselves."""
    if not len(tokens) or len(tokens) != len(stopped):
        raise PosttrainError(f"lengths: {len(tokens)} lengths and {len(stopped)} ends; expected as many, at least one")
    ended = [int(n) for n, end in zip(tokens, stopped, strict=True) if end]
    mean = float(sum(int(n) for n in tokens) / len(tokens))
    return Lengths(mean, sum(ended) / len(ended) if ended else math.nan, 1 - len(ended) / len(tokens))


@dataclass(frozen=True)
class Diagnosis:
    """One checkpoint. pass_at: k to the chance that one of k completions is right. behaviours: the share of
    completions that show each."""

    accuracy: float
    lengths: Lengths
    pass_at: dict[int, float]
    behaviours: dict[str, float]

    def metrics(self) -> dict[str, float]:
        """The same under flat names, for a log; what is unknown is left out."""
        found = {"accuracy": self.accuracy, "length": self.lengths.mean, "truncation": self.lengths.truncated}
        if not math.isnan(self.lengths.stopped):
            found["stopped_length"] = self.lengths.stopped
        return (
            found
            | {f"pass@{k}": value for k, value in self.pass_at.items()}
            | {f"behaviour/{name}": share for name, share in self.behaviours.items()}
        )


def diagnose(evaluation: Evaluation, ks: Sequence[int] | None = None, judge: Judge | None = None) -> Diagnosis:
    """The six curves' values at a checkpoint, from an evaluation with several samples a prompt.

    ks: of pass@k; None: 1, 2, 4, ... up to 256, as far as the samples go. judge: of behaviours; None: `PhraseJudge()`.
    """
    judge = judge or PhraseJudge()
    if ks is None:
        ks = [2**i for i in range(9) if 2**i <= evaluation.samples]
    right = evaluation.correct.sum(axis=1)
    shown: dict[str, int] = dict.fromkeys(getattr(judge, "behaviours", ()), 0)
    for question, row in zip(evaluation.questions, evaluation.completions, strict=True):
        for text in row:
            for name in set(judge(question, text)):
                shown[name] = shown.get(name, 0) + 1
    total = evaluation.n * evaluation.samples
    return Diagnosis(
        accuracy=float(evaluation.correct.mean()),
        lengths=lengths(evaluation.tokens.ravel().tolist(), evaluation.stopped.ravel().tolist()),
        pass_at={
            k: float(sum(pass_at_k(evaluation.samples, int(c), k) for c in right) / evaluation.n) for k in sorted(ks)
        },
        behaviours={name: count / total for name, count in shown.items()},
    )


def alarms(history: Sequence[Diagnosis], *, rise: float = 0.1, flat: float = 0.1, fall: float = 0.1) -> list[Alarm]:
    """What the last checkpoint of a run warns of.

    `degenerate growth`: more than `rise` more of the completions are cut off than at the first checkpoint, while those
    that end by themselves did not grow by more than `flat` (relative). `collapse`: accuracy is more than `fall` below
    the best so far. The thresholds are this library's: the paper looks at the curves.
    """
    if not history:
        return []
    first, last = history[0], history[-1]
    found: list[Alarm] = []
    grown = last.lengths.stopped / first.lengths.stopped - 1  # NaN where nothing ended by itself: no growth either
    if last.lengths.truncated - first.lengths.truncated > rise and not grown > flat:
        found.append("degenerate growth")
    if max(d.accuracy for d in history) - last.accuracy > fall:
        found.append("collapse")
    return found
