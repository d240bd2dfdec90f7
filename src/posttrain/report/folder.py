"""Reading a run folder, which may be incomplete: a killed run leaves files that are missing, short or cut in a line.

What cannot be read is left out and said in `RunFolder.problems`, so that the page can tell its reader; only a folder
without a readable `run.json` is an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.trajectory import PosttrainError

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage as the page shows it: `label` is its name, with its number where two stages share a name.

    size: of one that compresses, the bits of its weights and the bytes of the model before and after.
    """

    index: int
    label: str
    method: str = ""
    kind: str = ""
    steps: int | None = None
    size: str = ""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """What a run folder holds. A log that is missing is None, one that is empty is an empty list.

    run: the content of `run.json`.
    metrics: one row a step, ordered by stage and step.
    problems: one sentence for each thing that could not be read.
    """

    path: Path
    run: Row
    recipe: str | None = None
    metrics: list[Row] | None = None
    samples: list[Row] | None = None
    evaluations: list[Row] | None = None
    problems: list[str] = field(default_factory=list)

    def text(self, key: str) -> str:
        """A field of `run.json` in words: a mapping is named by its `name` or its first value, nothing is empty."""
        value = self.run.get(key)
        if isinstance(value, Mapping):
            value = value.get("name", next(iter(value.values()), ""))
        return "" if value is None else str(value)

    @property
    def stages(self) -> list[Stage]:
        """The planned stages, or where `run.json` names none, those that the metrics speak of."""
        planned = [stage for stage in _listed(self.run.get("stages")) if isinstance(stage, Mapping)]
        if not planned:
            seen = {stage_of(row): row.get("name", "") for row in self.metrics or []}
            planned = [{"index": index, "name": name} for index, name in sorted(seen.items())]
        names = [str(stage.get("name") or stage.get("method") or "stage") for stage in planned]
        return [
            Stage(
                index=number if (index := whole(stage.get("index"))) is None else index,
                label=name if names.count(name) == 1 else f"{name} ({number + 1})",
                method=str(stage.get("method") or ""),
                kind=str(stage.get("kind") or ""),
                steps=whole(stage.get("steps")),
                size=_size(stage.get("compression")),
            )
            for number, (stage, name) in enumerate(zip(planned, names, strict=True))
        ]


def read(path: Path) -> RunFolder:
    """Reads the run folder `path`; a PosttrainError where it is none or its `run.json` cannot be understood."""
    file = path / "run.json"
    if not file.is_file():
        raise PosttrainError(f"{path} is not a run folder: no run.json in it; give the folder that a run wrote")
    try:
        run = json.loads(file.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError) as error:
        raise PosttrainError(f"{file} is not JSON ({error}); restore it, or run again") from error
    if not isinstance(run, dict):
        raise PosttrainError(f"{file} holds a {type(run).__name__}; expected an object with name, status and stages")

    problems: list[str] = []
    metrics = _read_log(path / "metrics.jsonl", problems)
    return RunFolder(
        path=path,
        run=run,
        recipe=_read_text(path / "recipe.yaml"),
        metrics=None if metrics is None else _each_step_once(metrics, problems),
        samples=_read_log(path / "samples.jsonl", problems),
        evaluations=_read_log(path / "evaluations.jsonl", problems),
        problems=problems,
    )


def number(value: Any) -> float | None:
    """`value` as a finite float, or None where it is no number (truth values are none)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:  # an integer of more than 308 digits
        return None
    return value if math.isfinite(value) else None


def whole(value: Any) -> int | None:
    """`value` as an int, or None where it is no finite number."""
    found = number(value)
    return None if found is None else int(found)


def _size(record: Any) -> str:
    """`4.16 bits a weight, 84.1 → 23.4 MB`; empty where `run.json` does not tell it."""
    told = record if isinstance(record, Mapping) else {}
    bits, before, after = (number(told.get(key)) for key in ("bits", "bytes_before", "bytes_after"))
    if bits is None or before is None or after is None:
        return ""
    return f"{bits:.2f} bits a weight, {before / 1e6:.1f} → {after / 1e6:.1f} MB"


def stage_of(row: Row) -> int:
    """The index of the stage a row belongs to; 0 where it does not say."""
    return whole(row.get("stage")) or 0


def step_of(row: Row) -> int:
    """The step a row belongs to; 0 where it does not say."""
    return whole(row.get("step")) or 0


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else []


def _read_text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _read_log(path: Path, problems: list[str]) -> list[Row] | None:
    """The objects of a JSON Lines file, without the lines that hold none."""
    if not path.is_file():
        return None
    rows: list[Row] = []
    broken: list[int] = []
    last = 0
    with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        for last, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                rows.append(row)
            else:
                broken.append(last)
    if broken and broken[-1] == last:
        problems.append(f"{path.name}: the last line (line {last}) was cut short and left out.")
        broken.pop()
    if broken:
        lines_word = "line was" if len(broken) == 1 else "lines were"
        problems.append(f"{path.name}: {len(broken)} unreadable {lines_word} left out (the first is line {broken[0]}).")
    return rows


def _each_step_once(rows: list[Row], problems: list[str]) -> list[Row]:
    """One row a step, ordered by stage and step.

    The metrics of an update and those of an evaluation after it may be rows of their own, which are put together; where
    a resumed run logged a metric of a step again, its last account counts.
    """
    steps: dict[tuple[int, int], Row] = {}
    again = 0
    for row in rows:
        known = steps.setdefault((stage_of(row), step_of(row)), {})
        again += bool(known.keys() & row.keys() - {"stage", "name", "step", "time"})
        known.update(row)
    if again:
        problems.append(f"metrics.jsonl: {again} steps were logged again (a resumed run); the later account counts.")
    return [row for _, row in sorted(steps.items(), key=lambda item: item[0])]
