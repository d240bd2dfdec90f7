"""`posttrain run`: a recipe from end to end, going on, and what happens to everything that can be wrong with one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from commands import GRPO, SFT, call, files_of_at_most, make_folder, weights, write_recipe, write_rows

SUMMARY = r"held-out accuracy: \d+\.\d% \[\d+\.\d, \d+\.\d\] -> \d+\.\d% \[\d+\.\d, \d+\.\d\] \(n=4\)"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in a folder of its own, so that what a command leaves behind is seen."""
    monkeypatch.chdir(tmp_path)


# The whole way


def test_a_recipe_from_end_to_end(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path) -> None:
    recipe = write_recipe(tmp_path, tiny, SFT, GRPO)
    done = call(capsys, "run", recipe, "--output", "out", "--seed", "3", "--set", "stages.1.steps=1")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[:-1] == ["report: out/report.html", "model: out/model"]
    assert re.fullmatch(SUMMARY, lines[-1])
    assert (tmp_path / "out" / "report.html").is_file()
    kept = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert kept["seed"] == 3
    assert kept["stages"][1]["grpo"]["steps"] == 1
    assert "grpo 1/1 (" in done.err  # plain lines, as standard error is no terminal
    assert "s left)" in done.err
    for noise in ("it/s", "Loading weights", "Writing model", "Warning", "\r"):
        assert noise not in done.err

    again = call(capsys, "run", "--resume", "out")
    assert (again.code, again.out) == (0, done.out)  # a finished run tells its result again
    assert call(capsys, "report", "out").out == "out/report.html\n"


def test_without_a_task_the_last_line_says_where_the_model_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path
) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    recipe = write_recipe(tmp_path, tiny, {"sft": {"steps": 1, "data": rows}}, task=None, evaluate=None, output="out")
    done = call(capsys, "run", recipe)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "trained model: out/model"


def test_the_command_is_kept(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    write_recipe(tmp_path, tiny, {"sft": {"steps": 1, "data": rows}}, task=None, evaluate=None)
    monkeypatch.setattr("sys.argv", ["/bin/posttrain", "run", "recipe.yaml", "--output", "my run"])
    assert call(capsys, "run", "recipe.yaml", "--output", "my run").code == 0
    kept = json.loads((tmp_path / "my run" / "run.json").read_text())
    assert kept["command"] == "posttrain run recipe.yaml --output 'my run'"


# Mistakes that show before anything is done


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The error of a command that leaves nothing behind."""
    before = sorted(Path.cwd().rglob("*"))
    done = call(capsys, *arguments)
    assert (done.code, done.out) == (1, "")
    assert len(done.err.splitlines()) == 1
    assert sorted(Path.cwd().rglob("*")) == before
    return done.error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\ntask: chain_sum\nstages:\n  - sft: {epocs: 2}\n", "4: unknown key 'epocs'; did you mean epochs?"),
        ("model: m\ntask: chain_sum\nstages:\n  - gprpo\n", "4: unknown method 'gprpo'; did you mean grpo?"),
        ("model: m\ntask: chain_sum\nstages: [sft: {}, {]\n", "3: broken YAML: "),
        ("task: chain_sum\nstages: [sft]\n", "1: model is missing; expected "),
        ("model: m\ntask: chain_sum\nstages:\n  - sft:\n      steps: few\n", "5: steps is 'few'; input should be a "),
        ("model: m\ntask: chain_sum\nstages:\n  - {sft: {}, grpo: {}}\n", "4: got sft, grpo; expected one method "),
        ("model: m\ntask: chain_sun\nstages: [sft]\n", "2: unknown reasoning-gym task 'chain_sun'; did you mean "),
        ("model: m\ntask: rows.jsonl\nstages: [sft]\n", "2: no file rows.jsonl: "),
        ("model: m\ntask: chain_sum\nstages:\n  - grpo: {group: 1}\n", "4: grpo compares completions of a prompt; "),
        ("model: m\nstages:\n  - dpo: {data: pairs.jsonl}\n", "3: no file pairs.jsonl: "),
    ],
)
def test_mistakes_in_the_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    assert refused(capsys, "run", "recipe.yaml").startswith(f"error: recipe.yaml:{message}")


def test_mistakes_in_the_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path) -> None:
    write_recipe(tmp_path, tiny)
    assert refused(capsys, "run").startswith("error: no recipe given: expected posttrain run RECIPE.yaml")
    assert refused(capsys, "run", "absent.yaml").startswith("error: no recipe at absent.yaml")
    assert refused(capsys, "run", "recipe.yaml", "--set", "stages.0.stepps=3") == (
        "error: stages.0.stepps=3: unknown key 'stepps'; did you mean steps?"
    )
    assert refused(capsys, "run", "recipe.yaml", "--seed", "-1").startswith("error: seed=-1: seed is -1; expected")
    both = refused(capsys, "run", "recipe.yaml", "--resume", "out")
    assert both.startswith("error: --resume goes on with a run as it was started")
    assert refused(capsys, "run", "--resume", "absent").startswith("error: absent is not a run folder: no run.json")
    assert refused(capsys, "run", "--resume", ".").startswith("error: . is not a run folder: no run.json in it")


def test_a_run_folder_that_exists(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path) -> None:
    recipe = write_recipe(tmp_path, tiny)
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text('{"status": "finished"}')
    assert refused(capsys, "run", recipe, "--output", "out").startswith(
        "error: out holds a run already; resume it (posttrain run --resume out) or choose another output"
    )
    (out / "run.json").rename(out / "thesis.txt")
    assert refused(capsys, "run", recipe, "--output", "out").startswith("error: out exists and is no run; choose")
    assert refused(capsys, "run", recipe, "--output", "recipe.yaml").startswith("error: recipe.yaml exists and is no")


@pytest.mark.parametrize("under", ["recipe.yaml/out", "/proc/out"])
def test_a_run_folder_that_cannot_be(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path, under: str
) -> None:
    recipe = write_recipe(tmp_path, tiny)
    assert refused(capsys, "run", recipe, "--output", under).startswith(f"error: cannot make the run folder {under}: ")


@pytest.mark.parametrize("broken", ["{", "[]", "{}", ""])
def test_a_run_json_that_is_broken(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path, broken: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(write_recipe(tmp_path, tiny), out / "recipe.yaml")
    (out / "run.json").write_text(broken)
    assert "run.json" in refused(capsys, "run", "--resume", "out")


# Mistakes that show when the model is there


def test_no_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = call(capsys, "run", write_recipe(tmp_path, "empty"), "--output", "out")
    assert done.code == 1
    assert done.error.startswith("error: empty is no model: no config.json in it; expected a folder written by ")
    assert not (tmp_path / "out").exists()  # nothing was done: the mended recipe may take the folder
    other = call(capsys, "run", write_recipe(tmp_path, "smollm2-135n"), "--output", "out")
    assert (other.code, other.out) == (1, "")
    assert "did you mean smollm2-135m?" in other.error


def test_weights_cut_short(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path) -> None:
    model = shutil.copytree(tiny, tmp_path / "cut")
    os.truncate(model / "model.safetensors", 5000)
    done = call(capsys, "run", write_recipe(tmp_path, model), "--output", "out")
    assert done.code == 1
    assert done.error.startswith(f"error: cannot load a causal language model from {model}: ")


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
def test_a_dataset_of_one_row(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path, method: str) -> None:
    row = {
        "sft": {"prompt": "a", "completion": "b"},
        "dpo": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "grpo": {"prompt": "a", "answer": "b"},
    }[method]
    body = {"steps": 1, "data": "one.jsonl"} | ({"reward": "exact_match", "max_tokens": 2} if method == "grpo" else {})
    write_rows(tmp_path / "one.jsonl", row)
    recipe = write_recipe(tmp_path, tiny, {method: body}, task=None, evaluate=None)
    done = call(capsys, "run", recipe, "--output", "out")
    assert (done.code, done.out) == (1, "")
    assert done.error == f"error: {method}: 1 row to train on; expected 2 or more (rows: 1 trains on it alone)"
    meant = call(capsys, "run", recipe, "--output", "out2", "--set", "stages.0.rows=1")
    assert meant.code == 0, meant.err


def test_a_task_of_one_row(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path) -> None:
    write_rows(tmp_path / "one.jsonl", {"prompt": "a", "answer": "b"})
    recipe = write_recipe(tmp_path, tiny, task="one.jsonl")
    done = call(capsys, "run", recipe, "--output", "out")
    assert (done.code, done.out) == (1, "")
    assert done.error == "error: task one: no training problem has a worked solution to imitate"


LONG = "word " * 80  # 400 tokens of the byte-level tokenizer; the tiny model's context is 256


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {"grpo": {"steps": 1, "reward": "exact_match", "data": "long.jsonl"}},
            "long.jsonl:2: over-long: the prompt has ",
        ),
        ({"sft": {"steps": 1, "data": "long.jsonl"}}, "long.jsonl:2: over-long: the row has "),
    ],
)
def test_a_prompt_longer_than_the_context(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path, stage: dict, message: str
) -> None:
    rows = [{"prompt": text, "completion": "b", "answer": "b"} for text in ("a", LONG, "c")]
    write_rows(tmp_path / "long.jsonl", *rows)
    done = call(capsys, "run", write_recipe(tmp_path, tiny, stage, task=None, evaluate=None), "--output", "out")
    assert (done.code, done.out) == (1, "")
    assert done.error.startswith(f"error: {message}")
    assert "256" in done.error


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("where", ["train", "heldout"])
def test_a_prompt_of_the_task_longer_than_the_context(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path, where: str, before: bool
) -> None:
    rows = [{"prompt": text, "answer": "b"} for text in "abcd"]
    long = [*rows[:2], {"prompt": LONG, "answer": "b"}]
    train, heldout = (long, rows[2:]) if where == "train" else (rows[:2], [*rows[2:], long[2]])
    write_rows(tmp_path / "train.jsonl", *train)
    write_rows(tmp_path / "heldout.jsonl", *heldout)
    recipe = write_recipe(
        tmp_path, tiny, SFT, task={"file": "train.jsonl", "heldout": "heldout.jsonl"},
        evaluate={"max_tokens": 2, "before": before},
    )  # fmt: skip
    done = call(capsys, "run", recipe, "--output", "out")
    assert (done.code, done.out) == (1, "")
    subject = "held-out problems" if where == "heldout" else "sft: training rows"
    assert done.error.startswith(f"error: {subject}: 1 of 3 exceed the model's context of 256 tokens (the ")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()  # seen before the first step


def test_zero_trainable_tokens(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A template that marks what to generate, and marks nothing."""
    template = "{{ messages[0].content }}{% if false %}{% generation %}x{% endgeneration %}{% endif %}"
    model = make_folder(tmp_path / "model", template)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write_rows(tmp_path / "chat.jsonl", {"messages": turns}, {"messages": turns})
    recipe = write_recipe(tmp_path, model, {"sft": {"steps": 1, "data": "chat.jsonl"}}, task=None, evaluate=None)
    done = call(capsys, "run", recipe, "--output", "out")
    assert (done.code, done.out) == (1, "")
    assert done.error.startswith("error: chat.jsonl:1: no trainable token: ")


def test_a_reward_that_always_raises(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path) -> None:
    """The run is finished, the note says how often, and what the error says cannot harm the terminal."""
    (tmp_path / "bad.py").write_text(
        "def reward(completion, prompt):\n    raise RuntimeError('\\x1b[2J' + prompt.text)\n"
    )
    write_rows(tmp_path / "rows.jsonl", *({"prompt": text, "answer": "b"} for text in "aaaaaaaabcdefg"))
    task = {"file": "rows.jsonl", "heldout": 4, "reward": "bad.py:reward"}
    done = call(capsys, "run", write_recipe(tmp_path, tiny, GRPO, task=task), "--output", "out")
    assert done.code == 0, done.err
    notes = json.loads((tmp_path / "out" / "run.json").read_text())["notes"]
    assert notes[-1].startswith("grpo: rewards that raised: reward 8; the first: reward: RuntimeError: \x1b[2J")
    assert "grpo: rewards that raised: reward 8; the first: reward: RuntimeError: \\x1b[2J" in done.err
    assert "before: accuracy 0.0% [0.0, 49.0] (n=4); 4 reward errors, the first: reward: RuntimeError: " in done.err
    assert "\x1b" not in done.out + done.err


# The full disk


STEPS = {"sft": {"steps": 4, "batch": 2, "checkpoint_every": 1}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> bytes:
    """The weights that a run ends in when nothing goes wrong."""
    from posttrain.recipe import load_recipe
    from posttrain.run import execute

    folder = tmp_path_factory.mktemp("undisturbed")
    execute(load_recipe(write_recipe(folder, tiny, STEPS)), folder=folder / "out", show=False)
    return weights(folder / "out")


@pytest.mark.parametrize("size", [500, 5_000, 50_000, 200_000, 1_000_000])
def test_a_full_disk(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path, undisturbed: bytes, size: int
) -> None:
    """Whatever cannot be written (the recipe, an evaluation, a checkpoint, the model, the report): one line, and with
    room again the run goes on to the same weights."""
    recipe = write_recipe(tmp_path, tiny, STEPS)
    with files_of_at_most(size):
        done = call(capsys, "run", recipe, "--output", "out")
    assert (done.code, done.out) == (1, "")
    assert "free some space" in done.error
    if (tmp_path / "out" / "run.json").exists():
        again = call(capsys, "run", "--resume", "out")
    else:
        again = call(capsys, "run", recipe, "--output", "out")
    assert again.code == 0, again.err
    assert weights(tmp_path / "out") == undisturbed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB in memory, where mounting one is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_small_disk_that_runs_full(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path, undisturbed: bytes, small_disk: Path
) -> None:
    done = call(capsys, "run", write_recipe(tmp_path, tiny, STEPS), "--output", small_disk / "out")
    assert (done.code, done.out) == (1, "")
    assert "free some space" in done.error
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    again = call(capsys, "run", "--resume", small_disk / "out")
    assert again.code == 0, again.err
    assert weights(small_disk / "out") == undisturbed
