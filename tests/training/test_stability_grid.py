"""A grid of trainings: each is the loop's own, high rates diverge, and the table says what the runs do."""

from __future__ import annotations

import math

import pytest

from posttrain import methods, tasks
from posttrain.evaluation.stability import StabilityRule
from posttrain.models.causal import CausalPolicy
from posttrain.models.float_format import FloatFormat
from posttrain.models.simulated import SimulatedPrecision
from posttrain.training.stability import StabilityGrid, StabilityRun, stability_grid
from posttrain.training.stage import train_stage
from posttrain.trajectory import PosttrainError
from tiny_training import demonstrations, make_policy

ROWS = [{"prompt": f"p{i}", "answer": "a", "solution": "abcab"[: 2 + i % 3]} for i in range(24)]
TASK = tasks.from_rows(ROWS, heldout=4, name="letters")
METHOD = methods.sft().with_settings(steps=8, batch=4, schedule="constant", warmup=0.0)
COARSE = SimulatedPrecision(FloatFormat(8, 2, "truncate"))


def initial(seed: int) -> CausalPolicy:
    return make_policy(seed)


def test_each_run_is_the_loops_own() -> None:
    watched = demonstrations(4)
    grid = stability_grid(
        initial, METHOD, TASK, {"float": None, "e8m2": COARSE}, (1e-3,), seeds=(0, 1), watched=watched, every=4
    )
    assert [(r.precision, r.seed) for r in grid.runs] == [("float", 0), ("float", 1), ("e8m2", 0), ("e8m2", 1)]
    alone = train_stage(make_policy(1), METHOD.with_settings(learning_rate=1e-3), TASK, seed=1)
    assert grid.runs[1].losses == tuple(m["loss"] for m in alone.metrics)
    assert grid.runs[3].losses != grid.runs[1].losses
    assert [step for step, _ in grid.runs[0].sharpness] == [0, 4, 8]
    assert all(value > 0 for _, value in grid.runs[0].sharpness)
    assert grid.runs[2].sharpness[0] != grid.runs[0].sharpness[0], "it is measured in the run's own precision"
    assert grid.largest_stable_rate("float") == 1e-3


def test_a_rate_that_is_too_high_diverges_and_ends_nothing() -> None:
    method = METHOD.with_settings(steps=30, max_grad_norm=0.0)
    grid = stability_grid(
        initial, method, TASK, {"float": None}, (1e-3, 30.0), seeds=(0,), rule=StabilityRule(window=5)
    )
    good, bad = grid.runs
    assert (good.diverged, len(bad.losses)) == (None, 30)
    assert bad.diverged is not None
    assert grid.largest_stable_rate("float") == 1e-3
    assert "largest stable learning rate: float 0.001" in str(grid)


def run(
    precision: str, rate: float, seed: int, diverged: int | None, final: float, lead: int | None = None
) -> StabilityRun:
    return StabilityRun(precision, rate, seed, (1.0,), (), diverged, 2, lead, final)


def test_the_table() -> None:
    grid = StabilityGrid((
        run("a", 0.1, 0, None, 1.0), run("a", 0.1, 1, None, 2.0),
        run("a", 0.3, 0, 7, 3.0, 4), run("a", 0.3, 1, None, 5.0),
        run("b", 0.1, 0, 3, math.nan), run("b", 0.3, 0, None, 1.0),
    ))  # fmt: skip
    assert grid.rows()[:2] == [("a", "0.1", "0/2", "2", "1.5", "0.71", ""), ("a", "0.3", "1/2", "2", "4", "1.4", "4")]
    assert (grid.largest_stable_rate("a"), grid.largest_stable_rate("b")) == (0.1, 0.0)
    assert "nan" in str(grid)


def test_an_empty_grid_is_refused() -> None:
    with pytest.raises(PosttrainError, match="at least one precision"):
        stability_grid(initial, METHOD, TASK, {}, (1e-3,))
