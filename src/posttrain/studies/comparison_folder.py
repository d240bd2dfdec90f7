"""The folder of a comparison: its conditions, and a file for each job that is done."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain.training.checkpoint import write_text
from posttrain.trajectory import PosttrainError

PLAN, LOCK = "plan.json", ".lock"


@contextmanager
def opened(folder: Path, plan: dict[str, Any]) -> Iterator[None]:
    """The comparison's folder, for this process alone; one of other conditions is refused and left as it is."""
    from filelock import FileLock, Timeout

    kept = read_row(folder / PLAN)
    if kept is None and folder.exists() and (not folder.is_dir() or any(f.name != LOCK for f in folder.iterdir())):
        raise PosttrainError(f"{folder} exists and holds no comparison; choose another folder")
    different = [key for key in plan if kept is not None and kept.get(key) != plan[key]]
    if different and kept is not None:
        told = ", ".join(f"{key} {kept.get(key)} (now {plan[key]})" for key in different)
        raise PosttrainError(f"{folder} holds a comparison under other conditions: {told}; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(str(folder / LOCK), timeout=0):
            if kept is None:
                write_text(folder / PLAN, json.dumps(plan, indent=1))
            yield
    except Timeout:
        raise PosttrainError(f"{folder} is in use by another process; wait for it or stop it") from None
    except OSError as error:
        raise PosttrainError(
            f"cannot write to {folder}: {error.strerror or error}; mend that and run the same again"
        ) from error


def read_row(file: Path, keys: Collection[str] = ()) -> dict[str, Any] | None:
    """What a job wrote; None where it is not done, was cut short, or lacks some of the keys."""
    try:
        row = json.loads(file.read_text(encoding="utf-8"))
        return row if isinstance(row, dict) and set(keys) <= row.keys() else None
    except (OSError, ValueError):
        return None


def slug(name: str) -> str:
    """A name as part of a file's."""
    return re.sub(r"[^a-zA-Z0-9.]+", "-", name).strip("-.") or "method"
