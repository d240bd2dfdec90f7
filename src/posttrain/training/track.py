"""Tracking: metrics and samples of a run as JSON lines, and a progress display."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from posttrain.training.checkpoint import write_text
from posttrain.trajectory import Group

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
SAMPLES_PER_STEP = 8  # completions kept for the report, whole groups first
SHOWN = ("reward", "loss", "accuracy", "entropy", "kl", "length", "heldout_accuracy", "tokens_per_second")


class Tracker:
    """Writes what a stage reports to the run folder and shows it.

    With a terminal the display is a live bar with rate and time left; otherwise a plain line now and then.
    keep: where notes go that a reader of the report must see.
    """

    def __init__(
        self,
        folder: Path | None,
        stage: int,
        name: str,
        total: int,
        *,
        show: bool = True,
        out: TextIO | None = None,
        keep: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.folder, self.stage, self.name, self.total = folder, stage, name, total
        self.out = out or sys.stderr
        self.show, self.keep = show, keep
        self._begun, self._first_step, self._line_at = time.monotonic(), 0, 0.0
        self._bar: Any = None
        self._task: Any = None

    @classmethod
    def silent(cls) -> Tracker:
        return cls(None, 0, "", 0, show=False)

    # -- called by the loop ------------------------------------------------------------------------------------------

    def step(self, step: int, seconds: float, metrics: dict[str, float], groups: Sequence[Group]) -> None:
        record = {"stage": self.stage, "name": self.name, "step": step, "time": round(seconds, 3), **metrics}
        self._append(METRICS, [{k: _plain(v) for k, v in record.items()}])
        self._append(SAMPLES, self._sample_rows(step, groups))
        self._display(step, metrics)

    def evaluated(self, step: int, seconds: float, figures: dict[str, float]) -> None:
        record = {"stage": self.stage, "name": self.name, "step": step, "time": round(seconds, 3), **figures}
        self._append(METRICS, [record])
        self._print(f"{self.name} step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))

    def rollout(self, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, detail=f"rollout {done}/{total}")

    def note(self, text: str) -> None:
        """Something a reader of the report must know."""
        self.keep(f"{self.name}: {text}")
        self._print(f"{self.name}: {text}")

    def starts(self, step: int) -> None:
        """Training goes on from a step (0: from the stage's start); what a killed process logged after it goes, since
        those steps are done again."""
        self._first_step = step
        for file in (METRICS, SAMPLES):
            self._truncate(file, step)
        if step:
            self._print(f"{self.name}: resumed at step {step} of {self.total}")

    # -- display -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Tracker:
        self._begun = time.monotonic()
        if self.show and self.out.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
            from rich.table import Column

            self._bar = Progress(
                TextColumn("[bold]{task.description}"), BarColumn(20), MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"), TimeRemainingColumn(compact=True),
                # the metrics take the room that is left: on a narrow terminal they are cut, and nothing else
                TextColumn("{task.fields[detail]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
                console=Console(file=self.out), expand=True,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=self.total, rate="", detail="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _display(self, step: int, metrics: dict[str, float]) -> None:
        if not self.show:
            return
        detail = " ".join(f"{k} {metrics[k]:.3g}" for k in SHOWN if k in metrics and math.isfinite(metrics[k]))
        elapsed = time.monotonic() - self._begun
        per_step = elapsed / max(1, step - self._first_step)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, rate=f"{per_step:.1f} s/step", detail=detail)
        elif time.monotonic() - self._line_at > 10 or step == self.total:
            self._line_at = time.monotonic()
            left = per_step * (self.total - step)
            self._print(f"{self.name} {step}/{self.total} ({per_step:.1f} s/step, {left:.0f} s left): {detail}")

    def _print(self, text: str) -> None:
        if not self.show:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self.out, flush=True)

    # -- files -------------------------------------------------------------------------------------------------------

    def _append(self, name: str, records: Sequence[dict[str, Any]]) -> None:
        if self.folder is not None and records:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)

    def _sample_rows(self, step: int, groups: Sequence[Group]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for group in groups:
            if group.prompt is None or len(rows) >= SAMPLES_PER_STEP:
                break
            for t in group.trajectories:
                if t.source == "policy" and math.isfinite(t.reward):
                    rows.append(
                        sample_row(self.stage, self.name, step, "train", group, t.text, t.reward, t.rewards, t.finish)
                    )
        return rows[:SAMPLES_PER_STEP]

    def _truncate(self, name: str, step: int) -> None:
        if self.folder is None or not (file := self.folder / name).is_file():
            return
        kept = [
            line
            for line, record in json_lines(file)
            if record["stage"] < self.stage or (record["stage"] == self.stage and record["step"] <= step)
        ]
        write_text(file, "".join(kept))


def json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a file and what they hold, without one that a killed process was writing."""
    with file.open(encoding="utf-8", newline="\n") as lines:  # completions may hold any other end of a line
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if line.endswith("\n"):
                yield line, record


def sample_row(
    stage: int, name: str, step: int, split: str, group: Group, completion: str, reward: float,
    rewards: dict[str, float], finish: str,
) -> dict[str, Any]:  # fmt: skip
    """One line of `samples.jsonl`."""
    assert group.prompt is not None
    return {
        "stage": stage, "name": name, "step": step, "split": split, "prompt": group.prompt.question,
        "completion": completion, "answer": str(group.prompt.answer), "reward": _plain(reward),
        "rewards": {k: _plain(v) for k, v in rewards.items()}, "finish": finish,
    }  # fmt: skip


def _plain(value: Any) -> Any:
    """JSON has no NaN: a figure that is not finite is written as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
