"""Recipes that name a cluster, rollouts ahead, and rewards in processes of their own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from conftest import make_model, make_tokenizer
from posttrain.recipe import RecipeError, Where, parse_recipe
from posttrain.rollout.pool.cluster import Cluster
from posttrain.run import execute

TASK = {"file": [{"prompt": f"p{i}", "answer": "a"} for i in range(8)], "heldout": 2}
GRPO: dict[str, Any] = {"steps": 2, "batch": 2, "group": 3, "max_tokens": 5}


def recipe(model: str = "smollm2-135m", **more: Any) -> dict[str, Any]:
    stage = {"grpo": {**GRPO, **more.pop("stage", {})}}
    return {
        "model": {"id": model, "precision": "fp32"},
        "task": {**TASK, **more.pop("task", {})},
        "stages": [stage],
        **more,
    }


def test_a_cluster_is_an_address_or_a_mapping() -> None:
    assert parse_recipe(recipe()).cluster is None
    assert parse_recipe(recipe(cluster="auto")).cluster == Cluster("auto")
    given = {"address": "10.0.0.1:6379", "workers": 4, "cpus": 2, "gpus": 0.5, "reward_workers": 3, "piece": 8}
    found = parse_recipe(recipe(cluster=given))
    assert found.cluster == Cluster("10.0.0.1:6379", 4, 2, 0.5, 3, 8)
    assert parse_recipe(found.resolved()).cluster == found.cluster
    assert "cluster" not in parse_recipe(recipe()).resolved()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"cluster": {"worker": 4}}, "unknown key 'worker'; did you mean workers"),
        ({"cluster": {"workers": 0}}, "workers is 0"),
        ({"cluster": {"gpus": "two"}}, "gpus is 'two'"),
        ({"cluster": 4}, "cluster is 4; expected a mapping with address"),
        ({"cluster": "auto", "engine": "vllm"}, "the workers of a cluster draw by the embedded engine"),
        ({"stage": {"staleness": -1}}, "staleness is -1"),
        ({"stage": {"staleness": 0.5}}, "staleness is 0.5"),
        ({"stage": {"reward": {"exact_match": 1.0, "isolate": {"time": 3}}}}, "unknown setting of isolate 'time'"),
        ({"task": {"reward": {"exact_match": 1.0, "isolate": 3}}}, "isolate is 3; expected true"),
    ],
)
def test_mistakes_are_one_line(more: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        parse_recipe(recipe(**more), Where("recipe.yaml")).built_task()
    assert "\n" not in str(caught.value)


def test_a_run_with_an_isolated_reward_that_crashes(tmp_path: Path) -> None:
    """It trains to its end, ahead of its steps, and its notes say what the reward did."""
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "crashing.py").write_text(
        "import os\n\ndef reward(completion, prompt):\n"
        "    if prompt.question.strip()[-1] in '0123':\n        os._exit(5)\n    return len(completion)\n"
    )
    reward = {f"{tmp_path / 'crashing.py'}:reward": 1.0, "on_error": -2, "isolate": {"workers": 1}}
    chosen = recipe(str(tmp_path / "model"), task={"reward": reward}, stage={"steps": 4, "staleness": 1})
    run = execute(
        parse_recipe(chosen | {"evaluate": {"before": False, "max_tokens": 4}}), folder=tmp_path / "run", show=False
    )
    state = json.loads((run.folder / "run.json").read_text())
    assert state["status"] == "finished"
    note = r"grpo: rewards that raised: reward (\d+) \(crash \1\); the first: reward: its process ended \(exit code 5\)"
    (failed,) = (int(found[1]) for line in state["notes"] if (found := re.fullmatch(note, line)))
    metrics = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert sum(row.get("reward_errors", 0) for row in metrics if "loss" in row) == failed > 0
    assert [row["staleness"] for row in metrics if "loss" in row] == [0, 1, 1, 1]
