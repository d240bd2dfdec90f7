"""What is written to a terminal: text made harmless, and how far countable work has come."""

from __future__ import annotations

import re
import sys
import time
from typing import Any, TextIO

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 and C1 but for tab and newline
EVERY = 10.0  # seconds between plain lines


def printable(text: str) -> str:
    r"""The text with every control character as a visible escape (`\x1b`); newlines and tabs stay.

    Whatever a model wrote goes through here, so that it cannot move the cursor, set a title or hide what it said.
    """
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def one_line(text: str) -> str:
    """The text as one printable line."""
    return printable(" ".join(text.split()))


class Counter:
    """How far countable work has come, called with (done, total): an engine's progress callback.

    On a terminal a live bar with rate and time left, else a plain line every ten seconds and at the end.
    """

    def __init__(self, name: str, unit: str = "completions", *, show: bool = True, out: TextIO | None = None) -> None:
        self.name, self.unit, self.show = name, unit, show
        self.out = out or sys.stderr
        self._begun = self._line_at = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Counter:
        self._begun = self._line_at = time.monotonic()
        return self

    def __call__(self, done: int, total: int) -> None:
        if not self.show:
            return
        rate = done / max(time.monotonic() - self._begun, 1e-9)
        if self.out.isatty():
            if self._bar is None:
                self._start()
            self._bar.update(self._task, completed=done, total=total, rate=f"{rate:.1f} {self.unit}/s")
        elif time.monotonic() - self._line_at > EVERY or done == total:
            self._line_at = time.monotonic()
            left = (total - done) / max(rate, 1e-9)
            print(
                f"{self.name} {done}/{total} ({rate:.1f} {self.unit}/s, {left:.0f} s left)", file=self.out, flush=True
            )

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _start(self) -> None:
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), console=Console(file=self.out), transient=True,
        )  # fmt: skip
        self._bar.start()
        self._task = self._bar.add_task(escape(self.name), total=None, rate="")
