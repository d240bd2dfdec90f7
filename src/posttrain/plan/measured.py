"""Service times as they were measured: from a run's own metrics, or from a JSON file."""

from __future__ import annotations

import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

from posttrain.plan.overlap import Completions, Service
from posttrain.report.folder import Row, number, read
from posttrain.training.settings import Settings
from posttrain.trajectory import PosttrainError

KEYS = {
    "update_seconds": "of a training step",
    "token_seconds": "of a token of one completion, on a full worker",
    "completions": "of a training step",
    "slots": "completions that a worker decodes at once",
    "sync_seconds": "until workers have new weights",
    "prefill_seconds": "before the first token",
    "tokens": "mean length of a completion",
    "lengths": "measured lengths in tokens, a list",
}


def read_times(path: Path) -> dict[str, Any]:
    """What a file or a run folder tells of `KEYS`.

    A run folder tells it by its last online stage: medians over the steps of the seconds of rollouts and updates and of
    the mean length, the first step left out where there are others.
    """
    if path.is_dir():
        return _of_run(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PosttrainError(f"cannot read {path}: {error.strerror}; expected a JSON file or a run folder") from error
    except ValueError as error:
        raise PosttrainError(f"{path} is not JSON ({error}); expected an object with {', '.join(KEYS)}") from error
    if not isinstance(found, dict) or (unknown := sorted(set(found) - set(KEYS))):
        given = f"unknown key {unknown[0]!r}" if isinstance(found, dict) else f"a {type(found).__name__}"
        raise PosttrainError(f"{path} holds {given}; expected an object with {', '.join(KEYS)}")
    for key, value in found.items():
        values = value if key == "lengths" and isinstance(value, list) and value else [value]
        if any(number(v) is None for v in values):
            raise PosttrainError(f"{path}: {key} is {value!r}; expected a number, {KEYS[key]}")
    return found


def _of_run(path: Path) -> dict[str, Any]:
    folder = read(path)
    rows = [row for row in folder.metrics or [] if _has(row, "rollout_seconds", "update_seconds", "length", "rollouts")]
    if not rows:
        raise PosttrainError(
            f"{path}: no step of it tells rollout_seconds and update_seconds; expected a run with an online stage"
        )
    last = rows[-1]["stage"]
    rows = [row for row in rows if row["stage"] == last]
    counts = [b["rollouts"] - a["rollouts"] for a, b in pairwise(rows)] or [rows[0]["rollouts"]]
    completions = int(statistics.median(counts))
    timed = rows[1:] or rows
    slots = min(Settings().rollout_rows, completions)
    # a worker with all slots taken draws `slots` tokens in the time of one
    token = statistics.median(r["rollout_seconds"] * slots / (completions * r["length"]) for r in timed)
    return {
        "update_seconds": statistics.median(r["update_seconds"] for r in timed),
        "token_seconds": token,
        "completions": completions,
        "slots": slots,
        "tokens": statistics.median(r["length"] for r in timed),
    }


def _has(row: Row, *names: str) -> bool:
    return all(number(row.get(name)) is not None for name in names)


def service(told: dict[str, Any]) -> Service:
    """The service times of what was told; PosttrainError where one that has no default is missing."""
    for key in ("update_seconds", "token_seconds", "completions"):
        if told.get(key) is None:
            raise PosttrainError(
                f"{key} is missing ({KEYS[key]}); give --{key.replace('_', '-')}, or --times with a run folder or a "
                f"JSON file"
            )
    return Service(
        update=float(told["update_seconds"]),
        token=float(told["token_seconds"]),
        completions=int(told["completions"]),
        slots=int(told.get("slots") or Settings().rollout_rows),
        sync=float(told.get("sync_seconds") or 0.0),
        prefill=float(told.get("prefill_seconds") or 0.0),
    )


def completions(told: dict[str, Any], spread: float = 0.5, longest: float | None = None) -> Completions:
    """The lengths of what was told."""
    return Completions(
        mean=float(told.get("tokens") or 512.0),
        spread=spread,
        longest=longest,
        measured=tuple(float(v) for v in told.get("lengths") or ()),
    )
