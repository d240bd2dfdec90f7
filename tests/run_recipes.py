"""Recipes of runs that take a second, and what stands in the folders of their runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain.recipe import parse_recipe
from posttrain.run import Run, execute

FAST = {"learning_rate": 1e-2, "warmup": 0.0, "schedule": "constant"}
CHATS = [
    {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]} for i in range(20)
]
PAIRS = [{"prompt": f"q{i}", "chosen": "yes", "rejected": f"no {i}"} for i in range(12)]
MARKED = [{"prompt": f"q{i}", "completion": ("no", "yes")[i % 2], "label": i % 2 == 1} for i in range(12)]
TASK = {"file": [{"prompt": f"p{i}", "answer": "a", "solution": "a"} for i in range(24)], "heldout": 8}


def recipe(model: str, *stages: dict[str, Any], task: Any = None, **evaluate: Any) -> Any:
    given: dict[str, Any] = {
        "model": {"id": model, "precision": "fp32"},
        "stages": list(stages),
        "evaluate": {"max_tokens": 4, **evaluate},
    }
    return parse_recipe(given | ({"task": task} if task is not None else {}))


def go(found: Any, folder: Path, **options: Any) -> Run:
    return execute(found, folder=folder, show=False, **options)


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def state(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def jsonl(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def small(model: str, **settings: Any) -> Any:
    return recipe(model, {"sft": {**FAST, "steps": 4, "batch": 4, "data": {"source": CHATS}, **settings}})
