"""What goes to a terminal: harmless text, and how far countable work has come."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import terminal
from posttrain.terminal import Counter, one_line, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain [bold]text[/bold] ü 漢\n\tmore", "plain [bold]text[/bold] ü 漢\n\tmore"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("over\rwritten\x08", "over\\x0dwritten\\x08"),
        ("\x9b31m\x85\x7f\x00", "\\x9b31m\\x85\\x7f\\x00"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text())
@settings(deadline=None)
def test_nothing_printable_controls_a_terminal(text: str) -> None:
    shown = printable(text)
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in shown if c not in "\n\t")
    assert printable(shown) == shown
    assert len(one_line(text).splitlines()) <= 1 or re.search("[\u2028\u2029]", text)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Time that passes by itself: `step` seconds at every look."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 100.0, step

    def monotonic(self) -> float:
        self.now += self.step
        return self.now


def test_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line when ten seconds have gone by, and one at the end, each with rate and time left."""
    monkeypatch.setattr(terminal, "time", clock := Clock(0))
    out = io.StringIO()
    with Counter("evaluation", out=out) as counter:
        for done in range(1, 9):
            clock.now += 4
            counter(done, 8)
    assert out.getvalue().splitlines() == [
        "evaluation 3/8 (0.2 completions/s, 20 s left)",
        "evaluation 6/8 (0.2 completions/s, 8 s left)",
        "evaluation 8/8 (0.2 completions/s, 0 s left)",
    ]


def test_a_live_bar_on_a_terminal() -> None:
    out = Terminal()
    with Counter("evaluation [x]", out=out) as counter:
        counter(1, 4)
        counter(3, 4)
    text = out.getvalue()
    assert "evaluation [x]" in text
    assert "3/4" in text
    assert "completions/s" in text


@pytest.mark.parametrize("out", [io.StringIO(), Terminal()])
def test_nothing_is_shown_where_nothing_is_wanted_or_counted(out: io.StringIO) -> None:
    with Counter("evaluation", show=False, out=out) as counter:
        counter(4, 4)
    with Counter("evaluation", out=out):
        pass
    assert not out.getvalue()
