"""`posttrain plan`, as typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import call

from conftest import make_model


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration alone, without weights."""
    folder = tmp_path_factory.mktemp("bare")
    make_model(max_position_embeddings=1024).config.save_pretrained(folder)
    return folder


def test_it_needs_a_configuration_alone(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    done = call(capsys, "plan", "--model", config, "--method", "sft", "--cpu", "--length", 64, "--batch", 4)
    assert done.code == 0, done.err
    assert {"process", "weights", "moments", "gradients", "activations", "peak"} <= {
        line.split()[0] for line in done.out.splitlines() if line.strip()
    }
    assert f"sft on {config} fits as asked" in " ".join(done.out.split())


def test_as_json(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    options = ("--model", config, "--method", "grpo", "--gpus", 2, "--gpu-memory", "80GiB", "--lora", 4, "--json")
    done = call(capsys, "plan", *options, "--set", "max_tokens=32", "--set", "group=4")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["fits"] is True
    assert found["device"]["memory"] == 80 * 2**30
    assert (found["prompt"], found["completion"], found["gpus"]) == (128, 32, 2)
    assert found["asked"]["trained"] < found["asked"]["parameters"] / 2
    assert found["asked"]["phases"]["decode"]["parts"]["cache"] > 0
    assert sum(found["asked"]["parts"].values()) + found["device"]["process"] == pytest.approx(found["asked"]["bytes"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give --model and --method"),
        (("--model", "/nowhere", "--method", "sft"), "no configuration of a model at /nowhere"),
        (("--model", "x", "--method", "sftt"), "unknown method 'sftt'; did you mean sft?"),
        (("--model", "x", "--method", "gptq"), "gptq compresses and does not train"),
        (("--model", "x", "--method", "sft", "--cpu", "--gpus", 2), "--cpu and --gpus exclude each other"),
        (("--model", "x", "--method", "sft", "--gpus", 0), "--gpus is 0"),
        (("--model", "x", "--method", "sft", "--precision", "int3"), "--precision 'int3' is unknown"),
        (("--model", "x", "--method", "grpo", "--length", 50), "do not make --length 50"),
        (("--model", "x", "--method", "sft", "--length", 50, "--prompt", 50), "expected a prompt shorter"),
        (("--model", "x", "--method", "sft", "--page", "p.html"), "--page is for simulations"),
        (("--model", "x", "--method", "sft", "--set", "grup=3"), "unknown setting 'grup'"),
        (("--simulate",), "update_seconds is missing"),
        (("--simulate", "--seed", "9" * 23), f"--seed is {'9' * 23}; expected a whole number from 0"),
        (("--simulate", "--workers", "1,many"), "--workers '1,many'"),
        (("--simulate", "--times", "/nowhere.json"), "cannot read /nowhere.json"),
    ],
)
def test_mistakes_are_told_in_a_line(
    capsys: pytest.CaptureFixture[str], options: tuple[object, ...], message: str
) -> None:
    done = call(capsys, "plan", *options)
    assert done.code == 1
    assert message in done.error


def test_a_gpu_and_its_memory(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    base = ("plan", "--model", config, "--method", "sft", "--gpus", 1)
    assert "unknown GPU 'h10'" in call(capsys, *base, "--gpu", "h10").error
    assert "no amount of memory" in call(capsys, *base, "--gpu-memory", "lots").error
    thrifty = ("--lora", 4, "--set", "checkpointing=true", "--set", "token_budget=64")
    done = call(capsys, *base, "--gpu-memory", "1MiB", "--length", 64, *thrifty)
    assert done.code == 0
    assert "does not fit" in done.out


def test_a_simulation_with_a_page(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    times = tmp_path / "times.json"
    times.write_text(json.dumps({"update_seconds": 4.0, "token_seconds": 0.01, "completions": 32, "slots": 4}))
    base = ("plan", "--simulate", "--times", times, "--tokens", 100, "--workers", "1,2,4,8", "--steps", 12)
    page = tmp_path / "pages" / "overlap.html"
    done = call(capsys, *base, "--page", page, "--trainer-gpus", 8, "--gpus-per-worker", 2)
    assert done.code == 0, done.err
    assert "Staleness" in done.out
    assert "workers" in done.out
    text = page.read_text(encoding="utf-8")
    assert "the trainer never waits" in text
    assert text.count('class="plot"') == 3  # a figure for each spread
    assert "<script src" not in text
    found = json.loads(call(capsys, *base, "--json", "--staleness", "1", "--spread", "0").out)
    [curve] = found["curves"]
    assert [p["workers"] for p in curve["points"]] == [1, 2, 4, 8]
    # 8 waves of a second on one worker, two on four; an update takes four
    assert [round(p["step_seconds"], 6) for p in curve["points"]] == [8.0, 4.0, 4.0, 4.0]
    assert curve["saturates"] == 2
