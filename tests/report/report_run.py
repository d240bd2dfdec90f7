"""A run folder as the training loop leaves it, made by seed, and text that is hostile."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

# would run a script, and mark the window, wherever it became markup
HACK = '<script>window.hacked=1</script><img src=x onerror="window.hacked=2">'


def write_log(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def metric_rows(names: list[str], steps: int) -> list[dict[str, Any]]:
    """Two stages that each count from 1: the first offline, the second with rewards and a metric of its own."""
    chance = random.Random(0)
    rows: list[dict[str, Any]] = []
    for stage, name in enumerate(names):
        for step in range(1, steps + 1):
            row = {"stage": stage, "name": name, "step": step, "time": 2.0 * step, "tokens": 100 * step}
            row |= {"loss": 2 / step, "grad_norm": chance.random(), "tokens_per_second": 900 + chance.random()}
            if stage == 1:
                row |= {"reward": step / steps, "reward/format": 0.5, "entropy": 1 / step, "kl": 0.01 * step}
                row |= {"length": 20.0 + step, "clip_fraction": 0.01, "gate_open": chance.random()}
            rows.append(row)
    return rows


def sample_rows(name: str, steps: int) -> list[dict[str, Any]]:
    """Ten completions a step, the first of them held out; the reward is 1 for an even sum."""
    rows = []
    for step in range(1, steps + 1):
        for k in range(10):
            answer = step + k
            row = {"stage": 1, "name": name, "step": step, "split": "heldout" if k == 0 else "train"}
            row |= {"prompt": f"What is {step} + {k}?", "completion": f"Let me see.\nIt is {answer}.", "answer": answer}
            row |= {"reward": float(answer % 2 == 0), "rewards": {}, "finish": "stop"}
            rows.append(row)
    return rows


EVALUATIONS: list[dict[str, Any]] = [
    {"label": "before", "stage": -1, "step": 0, "accuracy": 0.05, "low": 0.03, "high": 0.09},
    {"label": "after sft", "stage": 0, "step": 40, "accuracy": 0.31, "low": 0.25, "high": 0.38},
    {"label": "after grpo", "stage": 1, "step": 40, "accuracy": 0.62, "low": 0.55, "high": 0.69},
    {"label": "comparison", "difference": 0.57, "low": 0.5, "high": 0.64, "p": 1e-9, "n": 200},
]


def write_run(path: Path, names: tuple[str, str] = ("sft", "grpo"), steps: int = 40, **overrides: Any) -> Path:
    """Fills the run folder `path` and returns it; `overrides` replace fields of run.json."""
    path.mkdir(exist_ok=True)
    run = {
        "name": "afternoon",
        "created": "2026-03-02T14:00:00",
        "finished": "2026-03-02T14:11:10",
        "status": "finished",
        "seed": 7,
        "command": "posttrain run recipe.yaml",
        "model": "smollm2-135m",
        "task": "chain_sum",
        "device": "cpu",
        "versions": {"posttrain": "0.1.0", "torch": "2.13.0"},
        "stages": [
            {"index": 0, "name": names[0], "method": "sft", "kind": "offline", "steps": steps},
            {"index": 1, "name": names[1], "method": "grpo", "kind": "online", "steps": steps},
        ],
        "notes": ["3 rows skipped: no answer"],
    }
    (path / "run.json").write_text(json.dumps(run | overrides), encoding="utf-8")
    (path / "recipe.yaml").write_text("model: smollm2-135m\nstages:\n  - sft: {rows: 600}\n", encoding="utf-8")
    write_log(path / "metrics.jsonl", metric_rows(list(names), steps))
    write_log(path / "samples.jsonl", sample_rows(names[1], steps))
    common = {"task": "chain_sum", "n": 200, "samples": 1, "pass_at_k": {}, "length": 30.0, "seconds": 12.0}
    write_log(path / "evaluations.jsonl", [common | row for row in EVALUATIONS])
    return path


def append(path: Path, text: str) -> None:
    """Adds text to a log as it is, broken or not."""
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
