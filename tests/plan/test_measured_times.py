"""Service times from a run's metrics, or from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.plan.measured import completions, read_times, service
from posttrain.trajectory import PosttrainError


def run_folder(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.mkdir()
    (path / "run.json").write_text(json.dumps({"name": "run", "status": "finished", "stages": []}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def step(number: int, rollout: float, update: float, length: float) -> dict[str, Any]:
    return {"stage": 1, "step": number, "rollouts": 64 * number, "rollout_seconds": rollout, "update_seconds": update,
            "length": length}  # fmt: skip


def test_a_run_tells_its_times_by_the_median_without_its_first_step(tmp_path: Path) -> None:
    rows = [{"stage": 0, "step": 1, "loss": 1.0, "update_seconds": 99.0}]
    rows += [step(1, 50.0, 9.0, 20.0), step(2, 2.0, 3.0, 20.0), step(3, 2.4, 3.2, 20.0), step(4, 2.2, 3.1, 20.0)]
    told = read_times(run_folder(tmp_path / "run", rows))
    assert told == {
        "update_seconds": 3.1, "token_seconds": pytest.approx(2.2 / 20), "completions": 64, "slots": 64, "tokens": 20.0,
    }  # fmt: skip
    assert service(told).completions == 64
    assert completions(told, spread=0.3).mean == 20.0


def test_a_file_tells_them_too(tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    file.write_text(json.dumps({"update_seconds": 4, "token_seconds": 0.02, "completions": 128, "lengths": [5, 9]}))
    told = read_times(file)
    assert service(told).slots == 64
    assert completions(told).measured == (5.0, 9.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "holds a list"),
        ("{", "is not JSON"),
        ('{"update": 3}', "unknown key 'update'"),
        ('{"update_seconds": "3"}', "update_seconds is '3'; expected a number"),
        ('{"lengths": [1, null]}', "lengths is"),
    ],
)
def test_a_file_with_something_else_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    file.write_text(text)
    with pytest.raises(PosttrainError, match=message):
        read_times(file)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(PosttrainError, match="cannot read"):
        read_times(tmp_path / "none.json")
    with pytest.raises(PosttrainError, match="expected a run with an online stage"):
        read_times(run_folder(tmp_path / "offline", [{"stage": 0, "step": 1, "loss": 1.0}]))
    with pytest.raises(PosttrainError, match="token_seconds is missing"):
        service({"update_seconds": 1.0, "completions": 4})
