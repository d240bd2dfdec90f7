"""`posttrain evaluate --decoding`: the table, the file and the page, with a model that was quantized by the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import Result, call, make_folder

TASK = "{reasoning_gym: chain_sum, terms: [2, 2], digits: [1, 1], train: 0, heldout: 6}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def evaluated(capsys: pytest.CaptureFixture[str], model: Path | str, *arguments: object) -> Result:
    return call(capsys, "evaluate", model, "--task", TASK, "--max-tokens", 4, *arguments)


def test_a_quantized_model_beside_the_float_one(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abc " * 200)
    made = call(capsys, "quantize", tiny, "--method", "llm-int8", "--calibration", text, "--output", "small")
    assert made.code == 0, made.err
    done = evaluated(
        capsys, "small", "--against", tiny, "--decoding", "temperature=0,0.5,1", "--decoding", "top_k=1,5",
        "--samples", 2, "--holdout", 4, "--output", "found.json", "--page", "page.html",
    )  # fmt: skip
    assert done.code == 0, done.err
    for word in ("temperature 0.5", "top_k 5", "total variation", "std of accuracy", "size:", "page: page.html"):
        assert word in done.out
    assert f"{tiny}, temperature 0.5 8/8" in done.err, "progress does not mix with the result"
    told = json.loads((tmp_path / "found.json").read_text())
    assert told["models"] == [str(tiny), "small"]
    assert [s["value"] for s in told["settings"]] == [0, 0.5, 1, 1, 5]
    assert told["base"]["max_tokens"] == 4
    assert 0 < told["shifts"]["small"][1]["variation"] < 0.2
    assert "<h1>" in (tmp_path / "page.html").read_text()


def test_one_model_alone(capsys: pytest.CaptureFixture[str], tiny: Path) -> None:
    done = evaluated(capsys, tiny, "--decoding", "temperature=0.5,1", "--holdout", 2)
    assert done.code == 0, done.err
    assert "total variation" not in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--decoding", "temperature=1"], "temperature has the values 1; expected at least two"),
        (["--decoding", "heat=1,2"], "unknown axis of decoding 'heat'"),
        (["--decoding", "top_p=0.5,1", "--against", "found.json"], "expected another model to measure beside"),
        (["--decoding", "top_p=0.5,1", "--k", "1,4"], "--k 1,4: pass@k is not measured along --decoding"),
        (["--decoding", "top_p=0.5,1", "--page", "none/page.html"], "there is no folder none; make it first"),
        (["--page", "page.html"], "--page page.html is of --decoding; give that too, or leave it out"),
    ],
)
def test_mistakes_are_told_in_a_line(
    capsys: pytest.CaptureFixture[str], tiny: Path, arguments: list[str], message: str
) -> None:
    done = evaluated(capsys, tiny, *arguments)
    assert done.code == 1
    assert message in done.err
    assert done.err.count("\n") == 1
