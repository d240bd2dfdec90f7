"""What an evaluation found: every completion with its score, accuracy and pass@k with intervals, and two compared."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.evaluation.statistics import Interval, Paired, bootstrap, paired_test, pass_at_k, wilson
from posttrain.trajectory import PosttrainError, Sampling


@dataclass(frozen=True, slots=True)
class Estimate:
    """A share in [0, 1] with its confidence interval (NaN ends where one prompt alone gives none)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f}% [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(eq=False)
class Evaluation:
    """What a model did on `n` prompts with `samples` completions each. Arrays are `[n, samples]`.

    questions, answers, keys: `[n]`, the prompts. completions: texts, `[n][samples]`.
    values: total reward. correct: whether the task counts it as right. parts: each reward component's own value.
    tokens: completion lengths, end token included. stopped: whether the completion ended by itself.
    errors: failures by reward component; first_error: the first one's message.
    sampling: None for multiple choice, where nothing is sampled (`completions` are then the options chosen).
    level: of every interval, by Wilson with one sample a prompt, by a bootstrap over prompts with several.
    """

    task: str
    questions: list[str]
    answers: list[Any]
    keys: list[int]
    completions: list[list[str]]
    values: NDArray[np.float64]
    correct: NDArray[np.bool_]
    parts: dict[str, NDArray[np.float64]]
    tokens: NDArray[np.int64]
    stopped: NDArray[np.bool_]
    sampling: Sampling | None
    ks: tuple[int, ...] = (1,)
    seed: int = 0
    level: float = 0.95
    errors: dict[str, int] = field(default_factory=dict)
    first_error: str | None = None

    @property
    def n(self) -> int:
        """Number of prompts."""
        return len(self.keys)

    @property
    def samples(self) -> int:
        """Completions a prompt."""
        return int(self.correct.shape[1])

    @cached_property
    def accuracy(self) -> Estimate:
        """Share of right completions."""
        return self._estimate(self.correct.mean(axis=1))

    @cached_property
    def pass_at_k(self) -> dict[int, Estimate]:
        """For each of `ks`, the chance that one of k completions is right (unbiased)."""
        right = self.correct.sum(axis=1)
        return {k: self._estimate(np.array([pass_at_k(self.samples, int(c), k) for c in right])) for k in self.ks}

    @property
    def mean_reward(self) -> float:
        return float(self.values.mean())

    @property
    def mean_tokens(self) -> float:
        """Mean completion length in tokens."""
        return float(self.tokens.mean())

    @property
    def share_stopped(self) -> float:
        """Share of completions that ended by themselves, not at the length limit."""
        return float(self.stopped.mean())

    def summary(self) -> str:
        """One line: `accuracy 43.5% [36.8, 50.4] (n=200)`, with pass@k, and with reward errors where there were any."""
        line = f"accuracy {self.accuracy} (n={self.n}{f', {self.samples} samples each' if self.samples > 1 else ''})"
        line += "".join(f", pass@{k} {estimate}" for k, estimate in self.pass_at_k.items() if k > 1)
        failed = sum(self.errors.values())
        return line + (f"; {failed} reward errors, the first: {self.first_error}" if failed else "")

    def metrics(self) -> dict[str, float]:
        """The numbers of this evaluation under flat names, for a log."""
        shares = {"accuracy": self.accuracy, **{f"pass@{k}": e for k, e in self.pass_at_k.items() if k > 1}}
        numbers = {f"{name}{end}": v for name, e in shares.items() for end, v in _ends(e).items()}
        parts = {f"reward/{name}": float(part.mean()) for name, part in self.parts.items()}
        return {
            **numbers,
            "reward": self.mean_reward,
            **parts,
            "tokens": self.mean_tokens,
            "stopped": self.share_stopped,
            "reward_errors": float(sum(self.errors.values())),
        }

    def to_json(self) -> str:
        """Everything above as JSON, for `from_json`; answers of a kind that JSON lacks become text."""
        columns = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        columns["sampling"] = None if self.sampling is None else dataclasses.asdict(self.sampling)
        return json.dumps({"metrics": _finite(self.metrics()), **columns}, default=_jsonable, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """The evaluation that `to_json` wrote."""
        try:
            row = json.loads(text)
            row.pop("metrics")
            for name, kind in (("values", float), ("correct", bool), ("tokens", int), ("stopped", bool)):
                row[name] = np.array(row[name], dtype=kind)
            row["parts"] = {name: np.array(part, dtype=float) for name, part in row["parts"].items()}
            row["ks"] = tuple(row["ks"])
            if row["sampling"] is not None:
                row["sampling"] = Sampling(**{**row["sampling"], "stop": tuple(row["sampling"]["stop"])})
            return cls(**row)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PosttrainError(f"no evaluation written by to_json: {type(error).__name__} {error}") from error

    def _estimate(self, values: NDArray[np.float64]) -> Estimate:
        """`values`: `[n]`, one a prompt. Where every prompt agrees a bootstrap has no width; Wilson's interval does."""
        total = float(values.sum())
        if self.samples == 1 or total in (0.0, float(self.n)):
            interval: Interval = wilson(round(total), self.n, self.level)
        else:
            interval = bootstrap(values, level=self.level, seed=self.seed)
        return Estimate(float(values.mean()), *interval)


def compare(a: Evaluation, b: Evaluation, seed: int = 0) -> Paired:
    """Whether two models differ on the same prompts (matched by their keys): the accuracy of `b` minus that of `a`."""
    common = set(a.keys) & set(b.keys)
    if not len(common) == a.n == b.n:
        raise PosttrainError(
            f"cannot compare: {a.task} on {a.n} prompts and {b.task} on {b.n} have {len(common)} in common; evaluate "
            "both models on the same held-out prompts"
        )
    row = {key: i for i, key in enumerate(b.keys)}
    return paired_test(a.correct, b.correct[[row[key] for key in a.keys]], level=a.level, seed=seed)


def _ends(estimate: Estimate) -> dict[str, float]:
    return {"": estimate.value, "_low": estimate.low, "_high": estimate.high}


def _finite(numbers: dict[str, float]) -> dict[str, float | None]:
    return {name: value if np.isfinite(value) else None for name, value in numbers.items()}


def _jsonable(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else str(value)
