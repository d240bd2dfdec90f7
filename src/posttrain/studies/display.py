"""How far the jobs of studies have come, on standard error: live bars on a terminal, else a line a job."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from posttrain.studies.runner import Job

SLOWEST = 20  # studies that are named


class Display:
    """Shows which arm and seed every worker is at, and how many jobs are done of `total`."""

    def __init__(self, total: int, out: TextIO | None = None) -> None:
        self.total, self.done = total, 0
        self.out = out or sys.stderr
        self.seconds: dict[str, float] = {}  # by study; what studies share counts where it ran
        self._begun: dict[Job, float] = {}
        self._lines: dict[Job, Any] = {}
        self._bars: Any = None
        self._all: Any = None

    def __enter__(self) -> Display:
        if self.total and self.out.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            self._bars = Progress(
                TextColumn("{task.description}", markup=False), BarColumn(20), MofNCompleteColumn(),
                TimeElapsedColumn(), console=Console(file=self.out), transient=True,
                redirect_stdout=False, redirect_stderr=False,
            )  # fmt: skip
            self._bars.start()
            self._all = self._bars.add_task("jobs", total=self.total)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def started(self, job: Job) -> None:
        self._begun[job] = time.monotonic()
        if self._bars is not None:
            self._lines[job] = self._bars.add_task(f"  {job}", total=1)

    def finished(self, job: Job, error: str | None) -> None:
        self.done += 1
        took = time.monotonic() - self._begun.pop(job)
        self.seconds[job.study] = self.seconds.get(job.study, 0.0) + took
        if self._bars is not None:
            self._bars.remove_task(self._lines.pop(job))
            self._bars.update(self._all, completed=self.done)
        if error is not None:
            self.say(f"{job}: failed: {error}")
        elif self._bars is None:
            self.say(f"[{self.done}/{self.total}] {job} ({took:.0f} s)")

    def summary(self) -> None:
        """Says which studies took longest, if any ran."""
        if self.seconds:
            self.say(f"jobs of {len(self.seconds)} studies took {sum(self.seconds.values()):.0f} s, most of it:")
        for study, seconds in sorted(self.seconds.items(), key=lambda item: -item[1])[:SLOWEST]:
            self.say(f"{seconds:8.1f} s  {study}")

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Room for other output: the bars come back after it."""
        if self._bars is not None:
            self._bars.stop()
        yield
        if self._bars is not None:
            self._bars.start()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self.out, flush=True)
