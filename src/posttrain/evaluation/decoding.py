r"""How a model takes to the way it is decoded, beside another: the diagnostic of quantized models of card 136.

Completions are drawn with the same random numbers for all models and settings. With Q(a) the share that is right at
value a of an axis,

.. math:: S = \mathrm{std}_a\,Q(a),\qquad \text{excess} = S - S_{\mathrm{ref}},\qquad
          \text{slope} = \frac{\sum_T (T - \bar T)\,Q(T)}{\sum_T (T - \bar T)^2},\ T \in [0.5, 0.8]

S is over the values of the grid, so it compares models on one grid and means nothing across grids; noise of sampling
adds to it, to all models' alike. Two models are *apart* at a setting where their Q differ by more than two standard
errors, taken over problems, paired.

Reference: Understanding the impact of post-training quantization on large language models, 2023, arXiv 2309.05210
(card 136).
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.evaluation.columns import aligned
from posttrain.evaluation.decoding_grid import DecodingGrid, Setting
from posttrain.evaluation.decoding_shift import Shift, common_vocabulary, shifts
from posttrain.evaluation.evaluate import evaluate
from posttrain.evaluation.evaluation import Estimate, Evaluation
from posttrain.evaluation.statistics import RESAMPLES
from posttrain.evaluation.task import Task
from posttrain.models.causal import CausalPolicy
from posttrain.rollout.engine import Progress
from posttrain.rollout.engine_choice import engine_for
from posttrain.rollout.rollout import rollout
from posttrain.trajectory import PosttrainError, Sampling

SLOPE = (0.5, 0.8)  # temperatures between which the slope is taken
SAMPLES, PROBLEMS = 5, 100
Counted = Callable[[str], AbstractContextManager[Progress | None]]  # progress of a piece of work of that name


@dataclass(frozen=True, eq=False)
class DecodingSensitivity:
    """What a grid of decoding found. models: names, the reference first.

    right: by model, `[settings, problems]` share of right completions. accuracy: by model, of each setting. shifts: by
    model but for the reference, of each setting, on text that the reference drew. rate: by model, tokens a second over
    the whole grid.
    """

    task: str
    grid: DecodingGrid
    models: tuple[str, ...]
    right: dict[str, NDArray[np.float64]]
    accuracy: dict[str, list[Estimate]]
    shifts: dict[str, list[Shift]]
    rate: dict[str, float]
    samples: int
    seed: int = 0
    level: float = 0.95

    @property
    def reference(self) -> str:
        return self.models[0]

    def sensitivity(self, model: str, axis: str) -> Estimate:
        """S along an axis."""
        return self._estimate(lambda quality: quality(model)[:, self.grid.places(axis)].std(1))

    def excess(self, model: str, axis: str) -> Estimate:
        """S less that of the reference."""
        places = self.grid.places(axis)
        return self._estimate(lambda q: q(model)[:, places].std(1) - q(self.reference)[:, places].std(1))

    def slope(self, model: str) -> Estimate | None:
        """Change of Q by a temperature higher by 1, between 0.5 and 0.8; None where the grid has not two such."""
        weights = self._slope_weights()
        return None if weights is None else self._estimate(lambda quality: quality(model) @ weights)

    def apart(self, model: str) -> list[Setting]:
        """The settings at which a model and the reference differ by more than two standard errors."""
        difference = self.right[model] - self.right[self.reference]
        problems = difference.shape[1]
        error = difference.std(1, ddof=1) / np.sqrt(problems) if problems > 1 else np.full(len(difference), np.inf)
        return [s for s, gap, e in zip(self.grid.settings, difference.mean(1), error, strict=True) if abs(gap) > 2 * e]

    def _slope_weights(self) -> NDArray[np.float64] | None:
        """What each setting's Q counts for in the slope."""
        settings = self.grid.settings
        low, high = SLOPE
        at = [i for i, s in enumerate(settings) if s.axis == "temperature" and low <= s.value <= high]
        if len(at) < 2:
            return None
        values = np.array([settings[i].value for i in at])
        weights = np.zeros(len(settings))
        weights[at] = (values - values.mean()) / ((values - values.mean()) ** 2).sum()
        return weights

    def _estimate(self, figure: Callable[[Callable[[str], NDArray[np.float64]]], NDArray[np.float64]]) -> Estimate:
        """A figure of the models' Q, `[draws, settings]`, with the interval of a bootstrap over problems (paired)."""
        problems = self.right[self.reference].shape[1]
        value = float(figure(lambda model: self.right[model].mean(1)[None])[0])
        if problems < 2:
            return Estimate(value, float("nan"), float("nan"))
        drawn = np.random.default_rng(self.seed).multinomial(problems, np.full(problems, 1 / problems), size=RESAMPLES)
        found = figure(lambda model: drawn @ self.right[model].T / problems)
        low, high = np.quantile(found, [(1 - self.level) / 2, (1 + self.level) / 2])
        return Estimate(value, float(low), float(high))

    # -- as text ------------------------------------------------------------------------------------------------------

    def accuracy_rows(self) -> list[tuple[str, ...]]:
        """A heading and a row a setting: every model's accuracy, starred where it is apart from the reference."""
        apart = {model: {str(s) for s in self.apart(model)} for model in self.models}
        rows: list[tuple[str, ...]] = [("accuracy", *self.models)]
        for i, setting in enumerate(self.grid.settings):
            cells = (f"{self.accuracy[m][i]}{'*' if str(setting) in apart[m] else ''}" for m in self.models)
            rows.append((str(setting), *cells))
        return rows

    def sensitivity_rows(self) -> list[tuple[str, ...]]:
        """A heading and a row an axis and model: S, its excess over the reference's, and the slope of temperature."""
        heading = ("sensitivity", "to", "std of accuracy", f"over {self.reference}", "slope 0.5 to 0.8", "tokens/s")
        rows: list[tuple[str, ...]] = [heading]
        for model in self.models:
            for axis, _ in self.grid.axes:
                slope = self.slope(model) if axis == "temperature" else None
                excess = "" if model == self.reference else signed(self.excess(model, axis))
                rows.append((
                    model, axis, str(self.sensitivity(model, axis)), excess, "" if slope is None else signed(slope),
                    f"{self.rate[model]:.3g}",
                ))  # fmt: skip
        return rows

    def shift_rows(self) -> list[tuple[str, ...]]:
        """A heading and a row a model and setting: distances of next-token distributions from the reference's."""
        heading = (f"distance from {self.reference}", "at", "KL", "total variation", "entropy", "flips")
        rows: list[tuple[str, ...]] = [heading]
        for model, found in self.shifts.items():
            for setting, shift in zip(self.grid.settings, found, strict=True):
                rows.append((
                    model, str(setting), f"{shift.kl:.3g}", f"{shift.variation:.3g}", f"{shift.entropy:+.3g}",
                    f"{shift.flips:.3g}",
                ))  # fmt: skip
        return rows

    def __str__(self) -> str:
        tables = [self.accuracy_rows(), self.sensitivity_rows()] + ([self.shift_rows()] if self.shifts else [])
        lines = [line for table in tables for line in (*aligned(table), "")]
        if any(self.apart(model) for model in self.models):
            lines.append(f"* more than two standard errors from {self.reference}")
        return "\n".join(lines).rstrip()

    def to_json(self) -> str:
        """All of it as JSON; what is no number becomes null."""
        whole = {
            "task": self.task, "models": self.models, "samples": self.samples, "seed": self.seed, "level": self.level,
            "base": dataclasses.asdict(self.grid.base),
            "settings": [{"axis": s.axis, "value": s.value} for s in self.grid.settings],
            "right": {model: right.tolist() for model, right in self.right.items()},
            "accuracy": {m: [dataclasses.asdict(e) for e in found] for m, found in self.accuracy.items()},
            "shifts": {m: [dataclasses.asdict(s) for s in found] for m, found in self.shifts.items()},
            "sensitivity": {
                m: {axis: dataclasses.asdict(self.sensitivity(m, axis)) for axis, _ in self.grid.axes}
                for m in self.models
            },
            "rate": self.rate,
        }  # fmt: skip
        return json.dumps(_finite(whole), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def decoding_sensitivity(
    models: Mapping[str, CausalPolicy],
    task: Task,
    grid: DecodingGrid | None = None,
    *,
    samples: int = SAMPLES,
    limit: int | None = PROBLEMS,
    seed: int = 0,
    level: float = 0.95,
    counted: Counted = lambda name: nullcontext(),
) -> DecodingSensitivity:
    """Decode the held-out problems of a task along a grid with each model, and compare all with the first of them.

    Args:
        models: by name; the first is the reference, which also draws the text that distributions are compared on.
        grid: None: temperatures from 0.1 to 1 of the task's own sampling.
        samples: completions a problem, with the same random numbers for all models (one at temperature 0). Their noise
            is larger than most effects: one is few.
        limit: only the first problems. seed: of sampling and of intervals. counted: shows progress.

    Raises:
        PosttrainError: no model, a task of multiple choice, nothing held out, different vocabularies.
    """
    if not models:
        raise PosttrainError("sensitivity to decoding: no model given; expected at least one")
    if task.multiple_choice:
        raise PosttrainError(
            f"task {task.name} is multiple choice, where nothing is decoded; expected a task of answers"
        )
    (first, reference), *others = models.items()
    for _, policy in others:
        common_vocabulary(policy, reference)
    grid = grid or DecodingGrid(base=task.sampling)
    right: dict[str, NDArray[np.float64]] = {}
    accuracy: dict[str, list[Estimate]] = {}
    rate: dict[str, float] = {}
    for name, policy in models.items():
        found, rate[name] = _evaluations(name, policy, task, grid, samples, limit, seed, level, counted)
        evaluations = [found[setting.sampling] for setting in grid.settings]
        right[name] = np.array([e.correct.mean(1) for e in evaluations])
        accuracy[name] = [e.accuracy for e in evaluations]
    apart: dict[str, list[Shift]] = {}
    if others:
        prompts = task.prompts(reference.tokenizer, "heldout", limit)
        text = rollout(engine_for(reference), prompts, 1, grid.base, seed, task.environment)
        ways = [setting.sampling for setting in grid.settings]
        for name, policy in others:
            with counted(f"{name} beside {first}") as progress:
                apart[name] = shifts(policy, reference, text, ways, progress)
    return DecodingSensitivity(
        task.name, grid, tuple(models), right, accuracy, apart, rate, samples, seed=seed, level=level
    )


def _evaluations(
    name: str, policy: CausalPolicy, task: Task, grid: DecodingGrid, samples: int, limit: int | None, seed: int,
    level: float, counted: Counted,
) -> tuple[dict[Sampling, Evaluation], float]:  # fmt: skip
    """An evaluation for every way of decoding that is in the grid (axes may share one), and tokens a second."""
    engine, found = engine_for(policy), dict[Sampling, Evaluation]()
    tokens, seconds = 0, 0.0
    for setting in grid.settings:
        if setting.sampling in found:
            continue
        begun = time.perf_counter()
        with counted(f"{name}, {setting}") as progress:
            made = evaluate(
                engine, policy.tokenizer, task, samples=1 if setting.sampling.temperature == 0 else samples,
                sampling=setting.sampling, limit=limit, seed=seed, level=level, progress=progress,
            )  # fmt: skip
        found[setting.sampling] = made
        tokens, seconds = tokens + int(made.tokens.sum()), seconds + time.perf_counter() - begun
    return found, tokens / seconds


def signed(estimate: Estimate) -> str:
    """A difference in points with its interval: `+1.2 [-0.4, +2.9]`."""
    return f"{100 * estimate.value:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
