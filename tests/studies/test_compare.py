"""Comparing methods: equal budgets, one job after the other, resumed, joined by later methods; and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import posttrain
from conftest import make_model, make_tokenizer
from posttrain import methods, tasks
from posttrain.cli.main import main
from posttrain.evaluation.task import Task
from posttrain.models.causal import CausalPolicy
from posttrain.studies import compare as module
from posttrain.studies.comparison import Comparison
from posttrain.training.method import stages_of
from posttrain.training.stage import Point, Trained
from posttrain.trajectory import PosttrainError

ROWS = [{"prompt": f"p{i}", "answer": "a", "solution": "a"} for i in range(40)]
FAST: dict[str, Any] = {"learning_rate": 1e-2, "batch": 2, "group": 2, "max_tokens": 3, "show": False}


def make_policy() -> CausalPolicy:
    return CausalPolicy(make_model(), make_tokenizer(), "tiny")


def make_task(heldout: int = 10) -> Task:
    return tasks.from_rows(ROWS, heldout=heldout, name="letters")


def compare(folder: Path, made: Any, budget: str = "100tokens", **options: Any) -> Comparison:
    return posttrain.compare(make_policy(), make_task(), made, budget=budget, folder=folder, **{**FAST, **options})


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, Any]]:
    """The jobs that were trained: (methods, seed, settings of the first stage). Nothing is; a step costs 10 tokens."""
    jobs: list[tuple[str, int, Any]] = []

    def train_stage(policy: CausalPolicy, method: Any, task: Task, *, seed: int, **_: Any) -> Trained:
        stages = stages_of(method)
        jobs.append(("+".join(stage.name for stage in stages), seed, stages[0].settings))
        steps = sum(min(s.settings.steps, -(-(s.settings.token_limit or 1_000_000) // 10)) for s in stages)
        metrics = [{"seconds": 1.0, "tokens": 10.0 * (i + 1), "reward": 0.5} for i in range(steps)]
        curve = [Point(0, 0.0, 0, 0, {"accuracy": 0.0}), Point(steps, 1.0 * steps, 10 * steps, 0, {"accuracy": 0.5})]
        return Trained(policy, curve, metrics, 1.0 * steps, 10 * steps, 0, steps)

    monkeypatch.setattr(module, "train_stage", train_stage)
    return jobs


def names(jobs: list[tuple[str, int, Any]]) -> list[tuple[str, int]]:
    """Without the timing of a step."""
    return [(name, seed) for name, seed, _ in jobs if seed < 1000]


def test_two_methods_with_two_seeds(tmp_path: Path) -> None:
    policy = make_policy()
    before = {name: p.clone() for name, p in policy.model.named_parameters()}
    options = {**FAST, "batch": 8, "seeds": 2, "folder": tmp_path / "c"}
    found = posttrain.compare(policy, make_task(), ["sft", methods.grpo()], budget="3ktokens", **options)
    assert all(torch.equal(before[name], p) for name, p in policy.model.named_parameters()), "copies are trained"
    assert [m.name for m in found.methods] == ["sft", "grpo"]
    assert (found.seeds, found.prompts, found.before.value) == (2, 10, 0.0)
    sft, grpo = found.methods
    assert sft.accuracy.value > 0.8 > 0.2 > grpo.accuracy.value, "imitation learns the letter, rewards never see it"
    assert found.sentence.startswith("sft beats grpo by ")
    for method in found.methods:
        assert 3000 <= method.tokens < 3600
    assert (sft.rollouts, grpo.rollouts > 0) == (0, True)
    steps = [point["step"] for point in found.runs["grpo"][0].curves["accuracy"]]
    assert steps[0] == 0
    assert steps[-1] == found.runs["grpo"][0].steps
    reward = found.runs["grpo"][0].curves["reward"]
    assert [point["step"] for point in reward] == list(range(1, len(reward) + 1))
    assert reward[-1]["tokens"] == found.runs["grpo"][0].tokens
    assert found.page.read_text().startswith("<!doctype html>")
    assert json.loads((tmp_path / "c" / "comparison.json").read_text())["sentence"] == found.sentence


def test_rollouts_as_budget(tmp_path: Path) -> None:
    found = compare(tmp_path / "c", [methods.grpo(), methods.rloo()], "12rollouts", seeds=1)
    assert [m.rollouts for m in found.methods] == [12, 12]


def test_what_is_there_is_not_done_again(tmp_path: Path, trained: list) -> None:
    first = compare(tmp_path / "c", ["sft", "grpo"], seeds=2)
    assert names(trained) == [("sft", 0), ("grpo", 0), ("sft", 1), ("grpo", 1)]
    trained.clear()
    assert str(compare(tmp_path / "c", ["sft", "grpo"], seeds=2)) == str(first)
    assert trained == [], "not even a step is timed"
    compare(tmp_path / "c", ["sft", "grpo", "rloo"], seeds=3)
    assert names(trained) == [("rloo", 0), ("rloo", 1), ("sft", 2), ("grpo", 2), ("rloo", 2)]


@pytest.mark.parametrize(("name", "count"), [("before.json", 1), ("sft-seed0.json", 2)])
def test_a_file_without_what_a_job_writes_is_written_anew(tmp_path: Path, trained: list, name: str, count: int) -> None:
    compare(tmp_path / "c", ["sft"], seeds=1)
    (tmp_path / "c" / name).write_text("{}")
    compare(tmp_path / "c", ["sft"], seeds=1)
    assert names(trained) == [("sft", 0)] * count
    assert "correct" in json.loads((tmp_path / "c" / name).read_text())


def test_stopped_in_the_middle_it_goes_on(tmp_path: Path, trained: list, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        real = module.train_stage
        patch.setattr(module, "train_stage", lambda *a, **k: stop() if len(names(trained)) == 2 else real(*a, **k))
        with pytest.raises(KeyboardInterrupt):
            compare(tmp_path / "c", ["sft", "grpo"], seeds=2)
    assert names(trained) == [("sft", 0), ("grpo", 0)]
    (tmp_path / "c" / "grpo-seed0.json").write_text('{"cut sho')
    trained.clear()
    compare(tmp_path / "c", ["sft", "grpo"], seeds=2)
    assert names(trained) == [("grpo", 0), ("sft", 1), ("grpo", 1)]


def test_a_method_that_was_changed_runs_again(tmp_path: Path, trained: list) -> None:
    compare(tmp_path / "c", {"mine": methods.grpo(), "sft": "sft"}, seeds=1)
    trained.clear()
    compare(tmp_path / "c", {"mine": methods.grpo(clip=0.3), "sft": "sft"}, seeds=1)
    assert names(trained) == [("grpo", 0)]


def test_other_conditions_need_another_folder(tmp_path: Path, trained: list) -> None:
    compare(tmp_path / "c", ["sft"], seeds=1)
    with pytest.raises(PosttrainError, match=r"under other conditions: budget 100tokens \(now 2m\); choose another"):
        compare(tmp_path / "c", ["sft"], "2m", seeds=1)
    with pytest.raises(PosttrainError, match=r"conditions: held-out prompts 10 \(now 4\)"):
        compare(tmp_path / "c", ["sft"], seeds=1, holdout=4)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(PosttrainError, match="exists and holds no comparison; choose another folder"):
        compare(tmp_path / "other", ["sft"], seeds=1)


def test_the_default_folder_is_that_of_the_conditions(
    tmp_path: Path, trained: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"seeds": 1, **FAST}
    folders = [
        posttrain.compare(make_policy(), make_task(), made, budget=budget, **options).folder
        for made, budget in ((["sft"], "100tokens"), (["grpo"], "100tokens"), (["sft"], "1m"))
    ]
    assert folders[0] == folders[1] != folders[2]
    assert folders[0].parent == Path("runs")
    assert folders[0].name.startswith("compare-letters-100tokens-")


def test_the_budget_alone_ends_a_run_unless_steps_are_given(tmp_path: Path, trained: list) -> None:
    """A step is 10 tokens: 13 steps for 100 tokens with a quarter to spare, and the limit is the same for all."""
    compare(tmp_path / "a", [methods.grpo().with_settings(steps=3)], seeds=1)
    probe, run = (settings for _, _, settings in trained)
    assert (probe.steps, probe.token_limit, probe.budget) == (3, None, None)
    assert (run.steps, run.epochs, run.token_limit) == (13, None, 100)
    trained.clear()
    found = compare(tmp_path / "b", [methods.grpo()], seeds=1, steps=4)
    assert [settings.steps for _, _, settings in trained] == [4]
    assert found.remarks == ["grpo spent 40% of its budget"]


def test_a_pipeline_divides_its_budget(tmp_path: Path, trained: list) -> None:
    found = compare(tmp_path / "c", [methods.sft() >> methods.grpo()], seeds=1)
    assert found.methods[0].name == "sft >> grpo"
    assert trained[-1][2].token_limit == 50


def test_steps_that_were_cheaper_than_those_timed_are_made_up_for(
    tmp_path: Path, trained: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.train_stage

    def dear_at_first(policy: Any, method: Any, task: Any, *, seed: int, **options: Any) -> Trained:
        found = real(policy, method, task, seed=seed, **options)
        if seed > 1000:
            found.tokens *= 5
        return found

    monkeypatch.setattr(module, "train_stage", dear_at_first)
    found = compare(tmp_path / "c", ["grpo"], seeds=2)
    assert [settings.steps for _, seed, settings in trained if seed < 1000] == [3, 11, 11]
    assert found.methods[0].tokens == 100
    assert not found.remarks


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        ([], {}, "compare: no method given"),
        (["dpo"], {}, "compare: dpo learns from preferences; a comparison trains on a task's prompts"),
        (
            ["sft"],
            {"budget": "9rollouts"},
            "compare: sft samples nothing in training, so that 9rollouts do not limit it",
        ),
        (["sft"], {"seeds": 0}, "compare: seeds is 0; expected at least 1"),
        (["sft"], {"holdout": 0}, "compare: holdout is 0; expected at least 1"),
        (["sft"], {"budget": "5x"}, "budget is '5x'; expected a time such as 90s"),
        (["sfd"], {}, "unknown method 'sfd'; did you mean sft"),
        (["sft", methods.sft()], {}, "compare: two methods are called sft; give a mapping with names of your own"),
        ({"a b": "sft", "a/b": "grpo"}, {}, "compare: 'a b' and 'a/b' would share a file; rename one"),
        (["sft"], {"lerning_rate": 1}, "unknown key 'lerning_rate'; did you mean learning_rate"),
    ],
)
def test_mistakes_in_python(tmp_path: Path, trained: list, made: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PosttrainError) as raised:
        compare(tmp_path / "c", made, **options)
    assert message in str(raised.value)
    assert not (tmp_path / "c").exists()
    assert trained == []


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.chdir(tmp_path)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["compare", *arguments])
    return code, *capsys.readouterr()


def test_the_command(capsys: pytest.CaptureFixture[str], saved: str, trained: list) -> None:
    arguments = [
        "--methods", "grpo, sft+grpo", "--model", saved, "--task", "{file: rows.jsonl, heldout: 6}", "--budget",
        "100tokens", "--seeds", "2", "--folder", "c", "--set", "clip=0.3", "--batch", "2", "--max-tokens", "3",
    ]  # fmt: skip
    code, out, err = call(capsys, *arguments)
    assert code == 0, err
    table = out.splitlines()
    assert [line.split("  ")[0] for line in table[:4]] == ["method", "before", "grpo", "sft+grpo"]
    assert table[-2] == "no difference between the two methods is beyond the noise"
    assert table[-1] == "page: c/compare.html"
    assert "grpo, seed 0: training for 100tokens" in err
    settings = trained[-1][2]
    assert (settings.batch, settings.max_tokens, settings.token_limit) == (2, 3, 50)
    assert names(trained) == [("grpo", 0), ("sft+grpo", 0), ("grpo", 1), ("sft+grpo", 1)]
    trained.clear()
    assert call(capsys, *arguments)[1] == out
    assert trained == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--budget": "5x"}, "budget is '5x'; expected a time such as 90s, 5m or 1h, or a number such as 2Mtokens or"),
        ({"--methods": "grpo,riskpoo"}, "unknown method 'riskpoo'; "),
        ({"--methods": "grpo,grpo"}, "--methods: grpo is given twice"),
        ({"--methods": " , "}, "--methods ' , ': expected names such as grpo,riskpo or gptq,awq"),
        ({"--methods": "sft,"}, "no model at nosuch/: no such folder"),
        ({"--set": "clipp=1"}, "unknown setting 'clipp'; did you mean clip"),
        ({"--set": "batch=0"}, "--set batch=0: batch is 0; expected at least 1"),
        ({"--task": "nosuch.jsonl"}, "no file nosuch.jsonl"),
    ],
)
def test_mistakes_on_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    given = {"--methods": "grpo", "--model": "nosuch/", "--task": "rows.jsonl", "--budget": "1m", **changes}
    code, out, err = call(capsys, *(part for pair in given.items() for part in pair))
    assert (code, out) == (1, "")
    assert err.startswith(f"posttrain: error: {message}")
    assert len(err.splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
