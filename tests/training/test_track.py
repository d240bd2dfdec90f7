"""Tracking: a line a step, what a killed process logged too much taken back, plain output without a terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.training.track import SAMPLES_PER_STEP, Tracker
from posttrain.trajectory import Group, Prompt, Trajectory


def group(key: int = 0, rewards: tuple[float, ...] = (1.0, 0.0), source: Any = "policy") -> Group:
    mask = torch.tensor([False, True])
    members = [
        Trajectory(torch.tensor([1, 2]), mask, reward=r, rewards={"right": r}, text=f"{key}-{i}", source=source)
        for i, r in enumerate(rewards)
    ]
    return Group(members, Prompt(torch.tensor([1]), text=f"question {key}", answer=key, key=key))


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def tracker(folder: Path | None, stage: int = 0, total: int = 10, **options: Any) -> Tracker:
    return Tracker(folder, stage, "grpo", total, **{"show": False, **options})


def test_a_step_is_a_line(tmp_path: Path) -> None:
    with tracker(tmp_path, stage=1) as found:
        found.step(1, 0.123456, {"loss": 0.5, "reward": 1}, [group()])
        found.evaluated(1, 0.2, {"heldout_accuracy": 0.25})
    assert rows(tmp_path / "metrics.jsonl") == [
        {"stage": 1, "name": "grpo", "step": 1, "time": 0.123, "loss": 0.5, "reward": 1},
        {"stage": 1, "name": "grpo", "step": 1, "time": 0.2, "heldout_accuracy": 0.25},
    ]
    first = rows(tmp_path / "samples.jsonl")[0]
    assert first == {
        "stage": 1, "name": "grpo", "step": 1, "split": "train", "prompt": "question 0", "completion": "0-0",
        "answer": "0", "reward": 1.0, "rewards": {"right": 1.0}, "finish": "none",
    }  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_null(tmp_path: Path, value: float) -> None:
    bad = group(rewards=(1.0,))
    bad.trajectories[0].rewards = {"right": value}
    tracker(tmp_path).step(1, 0.0, {"loss": value, "reward": 1.0}, [bad])
    text = (tmp_path / "metrics.jsonl").read_text() + (tmp_path / "samples.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert rows(tmp_path / "metrics.jsonl")[0]["loss"] is None
    assert rows(tmp_path / "samples.jsonl")[0]["rewards"] == {"right": None}


def test_samples_are_what_the_policy_wrote(tmp_path: Path) -> None:
    found = tracker(tmp_path)
    found.step(1, 0.0, {}, [group(source="expert")])
    found.step(2, 0.0, {}, [group(rewards=(float("nan"), 0.0))])  # one was never scored
    found.step(3, 0.0, {}, [group(k, (1.0, 0.0, 0.5)) for k in range(9)])
    samples = rows(tmp_path / "samples.jsonl")
    assert [s["step"] for s in samples] == [2] + [3] * SAMPLES_PER_STEP
    assert [s["prompt"] for s in samples[1:]] == [f"question {i // 3}" for i in range(SAMPLES_PER_STEP)]


def test_a_resumed_run_takes_back_later_lines(tmp_path: Path) -> None:
    for stage in (0, 1):
        with tracker(tmp_path, stage) as found:
            for step in range(1, 6):
                found.step(step, 0.1 * step, {"loss": 1.0}, [group(step)])
                found.evaluated(step, 0.1 * step, {"heldout_accuracy": 0.0})
    (tmp_path / "samples.jsonl").open("a").write('{"stage": 1, "step": 6, "compl')  # killed while it wrote
    (tmp_path / "metrics.jsonl").open("a").write('{"stage": 1, "st')

    tracker(tmp_path, stage=1).starts(3)
    metrics, samples = rows(tmp_path / "metrics.jsonl"), rows(tmp_path / "samples.jsonl")
    expected = [(0, s) for s in range(1, 6)] + [(1, s) for s in range(1, 4)]
    assert [(r["stage"], r["step"]) for r in metrics if "loss" in r] == expected
    assert [(r["stage"], r["step"]) for r in metrics if "loss" not in r] == expected
    assert [(r["stage"], r["step"]) for r in samples] == [e for e in expected for _ in range(2)]

    tracker(tmp_path, stage=1).starts(0)
    assert {r["stage"] for r in rows(tmp_path / "metrics.jsonl")} == {0}
    tracker(tmp_path, stage=0).starts(0)
    assert rows(tmp_path / "metrics.jsonl") == rows(tmp_path / "samples.jsonl") == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl"]


@pytest.mark.parametrize("half", ['{"stage": 0, "na', '{"stage": 0, "name": "grpo", "step": 1}'])
def test_a_line_after_a_half_written_one_stands_by_itself(tmp_path: Path, half: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage": 0, "name": "grpo", "step": 1}\n' + half)
    found = tracker(tmp_path)
    found.starts(1)
    found.step(2, 0.0, {"loss": 1.0}, [])
    assert [r["step"] for r in rows(tmp_path / "metrics.jsonl")] == [1, 2]


def test_text_with_other_line_ends_stays_one_line(tmp_path: Path) -> None:
    """JSON leaves U+2028 and U+0085 as they are, and Python's `splitlines` takes them for ends of lines."""
    strange = "one\u2028two\x85three\r\nfour\x1cfive"
    said = group(rewards=(1.0,))
    said.trajectories[0].text = strange
    found = tracker(tmp_path)
    found.step(1, 0.0, {}, [said])
    found.starts(1)
    with (tmp_path / "samples.jsonl").open(encoding="utf-8") as file:
        assert [json.loads(line)["completion"] for line in file] == [strange]


def test_plain_lines_without_a_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    notes: list[str] = []
    with tracker(tmp_path, show=True, out=out, total=3, keep=notes.append) as found:
        found.starts(0)
        for step in (1, 2, 3):
            found.step(step, 1.0, {"reward": 0.5, "loss": float("nan"), "unshown": 1.0}, [])
            found.rollout(1, 2)
        found.evaluated(3, 1.0, {"heldout_accuracy": 0.25})
        found.note("look here")
    text = out.getvalue()
    assert "\x1b" not in text, "no control characters in a log"
    assert "\r" not in text
    first, *_, last, evaluated, note = text.splitlines()
    assert first.startswith("grpo 1/3 (0.0 s/step, 0 s left): reward 0.5")
    assert last.startswith("grpo 3/3 ")
    assert "loss" not in text, "NaN is nothing to show"
    assert "unshown" not in text
    assert evaluated == "grpo step 3: heldout_accuracy 0.25"
    assert note == "grpo: look here"
    assert notes == ["grpo: look here"]


def test_a_resumed_stage_says_where(tmp_path: Path) -> None:
    out = io.StringIO()
    tracker(tmp_path, show=True, out=out).starts(4)
    assert out.getvalue() == "grpo: resumed at step 4 of 10\n"


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with tracker(tmp_path, show=True, out=out, total=2) as found:
        found.rollout(3, 8)
        found.step(1, 0.5, {"reward": 0.5}, [])
        found.note("[red]not markup[/red]")
        found.step(2, 1.0, {"reward": 0.75}, [])
    text = out.getvalue()
    assert "[red]not markup[/red]" in text
    assert "2/2" in text
    assert "reward 0.75" in text


def test_silence_writes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = Tracker.silent()
    with found:
        found.starts(0)
        found.step(1, 0.0, {"loss": 1.0}, [group()])
        found.evaluated(1, 0.0, {"heldout_loss": 1.0})
        found.note("nobody reads this")
    assert capfd.readouterr() == ("", "")
