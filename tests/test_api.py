"""The Python API: `train` and `evaluate` as short as the README shows, and the method of the documentation's page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import posttrain
from conftest import make_model, make_tokenizer
from posttrain import evaluate, methods, quantize, tasks, train
from posttrain.evaluation.task import Task, TaskItem
from posttrain.methods.registry import _METHODS
from posttrain.models.causal import CausalPolicy
from posttrain.reward.reward import reward_from
from posttrain.run import resume_run
from posttrain.trajectory import PosttrainError, Sampling

FAST: dict[str, Any] = {"learning_rate": 1e-2, "warmup": 0.0, "schedule": "constant", "show": False}
ROWS = [{"prompt": f"p{i}", "answer": "a", "solution": "a"} for i in range(24)]
CHATS = [{"prompt": f"say {i}", "completion": f"{i}!"} for i in range(12)]
SHORT = {"max_tokens": 4}


def make_policy(dtype: torch.dtype = torch.float32) -> CausalPolicy:
    return CausalPolicy(make_model().to(dtype), make_tokenizer(), "tiny")


def an_a(completion: str, prompt: Any) -> float:
    return float("a" in completion)


# -- train -----------------------------------------------------------------------------------------------------------


def test_the_names_of_the_package_are_functions() -> None:
    """Whatever was imported first: rooms of the same names must not take their place."""
    for name in posttrain.__all__:
        assert name in dir(posttrain)
        assert getattr(posttrain, name) is not None
    assert callable(posttrain.train)
    assert callable(posttrain.evaluate)
    with pytest.raises(AttributeError, match="has no attribute 'trane'"):
        _ = posttrain.trane


def test_a_pipeline_on_a_task(tmp_path: Path) -> None:
    policy = make_policy()
    task = tasks.from_rows(ROWS, heldout=8)
    pipeline = methods.sft().with_settings(steps=15, batch=8) >> methods.grpo().with_settings(steps=2, batch=2, group=4)
    run = train(policy, pipeline, task, folder=tmp_path / "run", evaluate=SHORT, max_tokens=4, **FAST)
    assert run.before is not None
    assert run.after is not None
    assert run.before.accuracy.value == 0
    assert run.after.accuracy.value > 0.9
    percent = r"\d+\.\d% \[\d+\.\d, \d+\.\d\]"
    assert re.fullmatch(rf"held-out accuracy: {percent} -> {percent} \(n=8\)", run.summary())
    assert run.summary().startswith("held-out accuracy: 0.0% [0.0, 32.4] -> ")
    assert run.report.is_file()
    found = evaluate(run.model, task, max_tokens=4)
    assert found.accuracy == run.after.accuracy
    assert found.summary() == f"accuracy {run.after.accuracy} (n=8)"
    again = evaluate(str(run.folder), task, max_tokens=4)
    assert again.completions == found.completions, "a run folder is a model"


def test_a_loaded_model_is_trained_in_place_with_and_without_an_adapter(tmp_path: Path) -> None:
    for name, lora in {"full": 0, "lora": 4}.items():
        policy = make_policy()
        tokens = torch.arange(3, 9)[None]
        before = policy.model(tokens).logits
        run = train(policy, "sft", data=CHATS, folder=tmp_path / name, steps=3, batch=4, lora=lora, **FAST)
        assert torch.equal(policy.model(tokens).logits, run.model.model(tokens).logits)
        assert not torch.allclose(policy.model(tokens).logits, before, atol=1e-2)
        assert not policy.adapted
        again = train(policy, "sft", data=CHATS, folder=tmp_path / f"{name}-again", steps=1, lora=2, **FAST)
        assert again.folder.name == f"{name}-again", "and can be trained on"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_has_the_precision_of_the_model_given(tmp_path: Path, dtype: torch.dtype) -> None:
    options = {"data": CHATS, "folder": tmp_path / "run", "steps": 2, "batch": 4, **FAST}
    first = train(make_policy(dtype), "sft", **options)
    again = train(make_policy(dtype), "sft", resume=True, **options)
    assert first.model.dtype == again.model.dtype == dtype
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recipe["model"]["precision"] == {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def test_data_may_be_a_list_a_file_or_a_mapping(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    ends = []
    for i, data in enumerate((CHATS, file, str(file), {"source": CHATS}, iter(CHATS))):
        run = train(make_policy(), methods.sft(), data=data, folder=tmp_path / str(i), steps=2, batch=4, **FAST)
        ends.append((run.folder / "model" / "model.safetensors").read_bytes())
    assert len(set(ends)) == 1
    held = {"source": CHATS, "heldout": 4}
    run = train(make_policy(), methods.sft(), data=held, folder=tmp_path / "held", steps=2, batch=4, **FAST)
    assert any("held-out loss" in note for note in json.loads((run.folder / "run.json").read_text())["notes"])


def test_rows_for_the_first_stage_and_a_task_for_the_second(tmp_path: Path) -> None:
    pipeline = methods.sft() >> methods.grpo().with_settings(group=2, max_tokens=3)
    task = tasks.from_rows(ROWS, heldout=4)
    run = train(make_policy(), pipeline, task, data=CHATS, folder=tmp_path / "run", steps=1, batch=2, **FAST)
    metrics = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["name"] for m in metrics] == ["sft", "grpo"]
    assert any(note.startswith("12 rows") for note in json.loads((run.folder / "run.json").read_text())["notes"])


def test_a_reward_of_ones_own(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 2, "batch": 2, "group": 4, "max_tokens": 3, **FAST}
    prompts = [{"prompt": row["prompt"], "answer": "a"} for row in ROWS]
    run = train(make_policy(), "grpo", data=prompts, reward=an_a, folder=tmp_path / "run", **options)
    assert run.after is None
    metrics = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert "reward/an_a" in metrics[0]
    # the function's name, not its address: the run can be resumed from another process
    recipe = yaml.safe_load((run.folder / "recipe.yaml").read_text())
    assert recipe["stages"][0]["grpo"]["reward"] == f"{an_a.__module__}:an_a"
    train(make_policy(), "grpo", data=prompts, reward=an_a, folder=tmp_path / "run", resume=True, **options)


def test_what_only_python_holds_is_resumed_from_python(tmp_path: Path) -> None:
    """`recipe.yaml` cannot hold a task object: resuming by the folder alone must say so, not fail on a name."""
    task = tasks.from_rows(ROWS, heldout=4, name="mine")
    changed = methods.grpo().replace(masks=()).with_settings(group=2, max_tokens=3)
    options: dict[str, Any] = {"folder": tmp_path / "run", "steps": 1, "batch": 2, **FAST}
    run = train(make_policy(), changed, task, **options)
    with pytest.raises(PosttrainError, match=r"cannot hold \(the task, the method grpo, changed\); resume it there"):
        resume_run(tmp_path / "run")
    assert train(make_policy(), changed, task, resume=True, **options).summary() == run.summary()


def test_a_run_of_names_alone_is_resumed_by_its_folder(saved: str, tmp_path: Path) -> None:
    task = {"file": ROWS, "heldout": 4}
    run = train(saved, methods.grpo(), task, folder=tmp_path / "run", steps=1, batch=2, group=2, max_tokens=3, **FAST)
    assert resume_run(tmp_path / "run", show=False).summary() == run.summary()
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["task"] == task


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"method": "sfd", "data": CHATS}, "unknown method 'sfd'; did you mean sft"),
        (
            {"method": "sft", "data": CHATS, "lerning_rate": 1},
            "unknown key 'lerning_rate'; did you mean learning_rate?",
        ),
        ({"method": "sft", "data": CHATS, "batch": "many"}, "batch is 'many'"),
        ({"method": "sft", "data": CHATS, "batch": 0}, "batch is 0; expected at least 1"),
        ({"method": "sft", "data": CHATS, "budget": "soon"}, "budget is 'soon'; expected a duration"),
        ({"method": "sft", "data": {"source": CHATS, "holdout": 3}}, "unknown key 'holdout'; did you mean heldout?"),
        ({"method": "sft", "data": CHATS, "evaluate": {"sample": 1}}, "unknown key 'sample'; did you mean samples?"),
        ({"method": "sft"}, "sft has nothing to train on; give a task"),
        ({"method": "dpo", "task": {"file": ROWS}}, "dpo learns from preferences"),
        ({"method": "dpo", "data": CHATS}, "missing column: no chosen and no rejected; the row has prompt, completion"),
        ({"method": "grpo", "data": ROWS}, "grpo needs a reward"),
        ({"method": "sft", "data": CHATS, "reward": an_a}, "no stage samples completions"),
        ({"method": "sft", "data": CHATS, "resume": True}, "resume needs the folder"),
        ({"method": "grpo", "task": {"file": ROWS}, "group": 1}, "group is 1"),
        ({"method": "grpo", "task": 7}, "task: got 7"),
    ],
)
def test_mistakes_are_one_line(
    call: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PosttrainError, match=re.escape(message)) as error:
        train(make_policy(), show=False, **call)
    assert "\n" not in str(error.value)
    assert not any(tmp_path.rglob("model.safetensors"))


def test_models_that_cannot_be_trained_are_refused() -> None:
    from posttrain.models.adapters import add_lora

    with pytest.raises(PosttrainError, match=r"tiny is in torch\.float16; training computes in bf16 or fp32"):
        train(make_policy(torch.float16), "sft", data=CHATS)
    with pytest.raises(PosttrainError, match="has an adapter already; merge it first"):
        train(add_lora(make_policy(), rank=2), "sft", data=CHATS)


# -- quantize --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"method": "gptq", "bits": 2.5}, "gptq: bits is 2.5; input should be a valid integer"),
        ({"method": "gptq", "bits": "abc"}, "gptq: bits is 'abc'; input should be a valid integer"),
        ({"method": "gptq", "bits": None}, "gptq: bits is None; input should be a valid integer"),
        ({"method": "gptq", "bts": 2}, "unknown argument of gptq 'bts'; did you mean bits?"),
        ({"method": "gptq", "damping": -1}, "damping is -1; expected a number from 0 on"),
        ({"method": "grpo", "bits": 2}, "quantize: grpo does not compress; use train for it"),
        ({"method": 3}, "quantize: 3 does not compress"),
        ({"method": methods.rtn(), "bits": 2}, "quantize: rtn is made already; give bits where it is made"),
        ({"method": "rtn", "calibration": 42}, "the calibration text is a number (42); expected a file of text"),
        ({"method": "rtn", "calibration": ["a", 1]}, "the calibration text is a number (1); expected a file of text"),
        ({"method": "rtn", "samples": "3"}, "quantize: samples is '3'; input should be a valid integer"),
        ({"method": "rtn", "samples": 0}, "quantize: samples is 0; input should be greater than or equal to 1"),
        ({"method": "rtn", "length": 2.5}, "quantize: length is 2.5; input should be a valid integer"),
        ({"method": "rtn", "seed": "x"}, "quantize: seed is 'x'; expected a whole number from 0 to 4294967295"),
        ({"method": "rtn", "seed": 10**23}, "quantize: seed is 100000000000000000000000; expected a whole number"),
        ({"method": "rtn", "skip": 3}, "quantize: skip is 3; "),
        ({"method": "rtn", "group": 16, "skip": "*.nosuch"}, "skip pattern '*.nosuch' matches no linear layer"),
    ],
)
def test_mistakes_in_quantizing_are_one_line(call: dict[str, Any], message: str) -> None:
    with pytest.raises(PosttrainError, match=re.escape(message)) as error:
        quantize(make_policy(), show=False, **{"calibration": ["a b c " * 20], **call})
    assert "\n" not in str(error.value)


def test_quantize_takes_one_pattern_and_refuses_what_is_compressed() -> None:
    small = quantize(make_policy(), "rtn", ["a b c " * 20], group=16, skip="*.down_proj", show=False)
    names = [layer.name for layer in small.compression.layers]
    assert len(names) == 12
    assert not any(name.endswith("down_proj") for name in names)
    with pytest.raises(PosttrainError, match=r"is compressed already \(rtn\); compress the float model instead"):
        quantize(small, "gptq", ["a b c"])


# -- evaluate --------------------------------------------------------------------------------------------------------


def test_evaluate_samples_and_passes() -> None:
    task = tasks.from_rows(ROWS, heldout=6, reward=reward_from(an_a))
    policy = make_policy()
    found = evaluate(policy, task, samples=4, k=(1, 4), max_tokens=8, holdout=3, seed=2)
    assert (found.n, found.samples) == (3, 4)
    assert found.sampling == Sampling(max_tokens=8)
    assert set(found.pass_at_k) == {1, 4}
    assert evaluate(policy, task, samples=4, k=(1, 4), max_tokens=8, holdout=3, seed=2).completions == found.completions
    greedy = evaluate(policy, task, max_tokens=8)
    assert greedy.sampling is not None
    assert greedy.sampling.temperature == 0


def test_evaluate_multiple_choice(saved: str, tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "options": ["yes", "no", "perhaps"], "label": i % 3} for i in range(6)]
    task = tasks.multiple_choice(rows, metric="total")
    found = evaluate(saved, task)
    assert found.n == 6
    assert {c for row in found.completions for c in row} <= {"yes", "no", "perhaps"}
    # the option that its own log-likelihood makes most likely
    policy = CausalPolicy(make_model(), make_tokenizer(), "tiny")
    prompt = task.prompts(policy.tokenizer, "heldout")[0]
    scores = {}
    for option in ("yes", "no", "perhaps"):
        answer = policy.tokenizer.encode(option, add_special_tokens=False)
        logits = policy.model(torch.cat([prompt.tokens, torch.tensor(answer)])[None]).logits[0].detach().log_softmax(-1)
        start = len(prompt.tokens) - 1
        scores[option] = float(logits[start : start + len(answer)].gather(1, torch.tensor(answer)[:, None]).sum())
    assert found.completions[0] == [max(scores, key=scores.__getitem__)]
    # and before and after training
    fit = Task("fit", [TaskItem("q", solution="yes")], task.heldout, task.reward, metric="total")
    run = train(policy, "sft", fit, folder=tmp_path / "run", steps=2, rows=1, **FAST)
    assert run.before is not None
    assert run.before.completions == found.completions
    assert run.after is not None


# -- the documentation's method ----------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs" / "write-your-own-method.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_a_method_is_at_most_twenty_lines() -> None:
    definition = blocks()[0]
    assert "@methods.method(" in definition
    assert "def of(" in definition, "with a part of its own"
    assert sum(bool(line.strip()) for line in definition.splitlines()) <= 20


def test_the_page_runs(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    definition, training, check = blocks()
    small: dict[str, Any] = {
        "model": saved,
        "task": {"file": ROWS, "heldout": 4, "reward": f"{__file__}:an_a"},
        "settings": {"steps": 24, "batch": 4, "group": 8, "max_tokens": 8, **FAST, "folder": "run"},
    }
    for name, value in small.items():
        training, count = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", training, flags=re.MULTILINE)
        assert count == 1
    monkeypatch.chdir(tmp_path)
    known = dict(_METHODS)
    names: dict[str, Any] = {"__name__": "a_page"}
    try:
        for block in (definition, training, check):
            exec(compile(block, str(PAGE), "exec", dont_inherit=True), names)
        assert methods.find("reward-weighted-regression").family == "policy-gradient"
        assert methods.find("reward-weighted-regression").parameters == {"temperature": 0.5}
    finally:
        _METHODS.clear()
        _METHODS.update(known)
    assert re.search(r"^held-out accuracy: .* -> .* \(n=4\)$", capsys.readouterr().out, flags=re.MULTILINE)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rewards = [m["reward"] for m in metrics]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.5, "it learns"
    assert list(names["run"].folder.glob("model/*.safetensors"))
