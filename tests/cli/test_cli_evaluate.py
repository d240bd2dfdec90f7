"""`posttrain evaluate`: a model on a task, and beside another."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from commands import Result, call, files_of_at_most, make_folder, write_rows

from posttrain.cli.evaluate import in_words
from posttrain.evaluation.evaluation import Evaluation
from posttrain.evaluation.statistics import Paired

TASK = "{reasoning_gym: chain_sum, terms: [2, 2], digits: [1, 1], train: 0, heldout: 6}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def evaluated(capsys: pytest.CaptureFixture[str], model: Path, *arguments: object) -> Result:
    return call(capsys, "evaluate", model, "--task", TASK, "--max-tokens", 4, *arguments)


def test_the_summary(capsys: pytest.CaptureFixture[str], tiny: Path) -> None:
    done = evaluated(capsys, tiny)
    assert (done.code, done.out) == (0, "accuracy 0.0% [0.0, 39.0] (n=6)\n")
    assert done.err.startswith(f"evaluating {tiny} 6/6 (")  # progress does not mix with the result


def test_options_and_the_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path) -> None:
    options = "--samples 4 --holdout 5 --temperature 0.5 --k 1,4 --seed 3 --output a.json"
    done = evaluated(capsys, tiny, *options.split())
    assert done.code == 0, done.err
    assert done.out.startswith("accuracy 0.0% [")
    assert "(n=5, 4 samples each), pass@4 0.0% [" in done.out
    found = Evaluation.from_json((tmp_path / "a.json").read_text())
    assert (found.n, found.samples, found.ks, found.seed) == (5, 4, (1, 4), 3)
    assert found.sampling is not None
    assert (found.sampling.temperature, found.sampling.max_tokens) == (0.5, 4)
    assert int(found.tokens.max()) <= 4


def test_several_samples_are_drawn_at_temperature_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path
) -> None:
    assert evaluated(capsys, tiny, "--samples", 2, "--output", "a.json").code == 0
    sampling = Evaluation.from_json((tmp_path / "a.json").read_text()).sampling
    assert sampling is not None
    assert sampling.temperature == 1


def test_against_a_file_and_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path) -> None:
    """A reward that counts the letter b tells two models apart; a model does not differ from itself."""
    (tmp_path / "count.py").write_text("def b(completion, prompt):\n    return float('b' in completion)\n")
    write_rows(tmp_path / "rows.jsonl", *({"prompt": f"{n}?", "answer": "b"} for n in range(30)))
    task = "{file: rows.jsonl, heldout: 30, reward: 'count.py:b'}"
    other = make_folder(tmp_path / "other", seed=1)
    common = ["--task", task, "--max-tokens", 24, "--temperature", 1.0]
    assert call(capsys, "evaluate", other, *common, "--output", "other.json").code == 0
    from_file = call(capsys, "evaluate", tiny, *common, "--against", "other.json")
    from_model = call(capsys, "evaluate", tiny, *common, "--against", other)
    assert from_file.code == from_model.code == 0
    assert from_file.out.replace("other.json", str(other)) == from_model.out
    first, second, words = from_model.out.splitlines()
    assert first.startswith(f"{tiny}: accuracy ")
    assert second.startswith(f"{other}: accuracy ")
    assert "95% interval" in words
    assert "p = " in words
    same = call(capsys, "evaluate", other, *common, "--against", "other.json").out.splitlines()[-1]
    assert same.startswith(f"no clear difference: {other} minus other.json is +0.0 points, 95% interval +0.0 to +0.0")


@pytest.mark.parametrize(
    ("paired", "words"),
    [
        (Paired(0.2, 0.1, 0.3, 0.001, 100, "exact McNemar"),
         "a is better than b by 20.0 points: 95% interval +10.0 to +30.0, p = 0.001 (exact McNemar, n=100)"),
        (Paired(-0.2, -0.3, -0.1, 0.001, 100, "exact McNemar"),
         "a is worse than b by 20.0 points: 95% interval -30.0 to -10.0, p = 0.001 (exact McNemar, n=100)"),
        (Paired(0.02, -0.1, 0.14, 0.7, 100, "exact McNemar"),
         "no clear difference: a minus b is +2.0 points, 95% interval -10.0 to +14.0, p = 0.7 (exact McNemar, n=100)"),
    ],
)  # fmt: skip
def test_in_words(paired: Paired, words: str) -> None:
    assert in_words("a", "b", paired, 0.95) == words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "chain_sun"], "unknown reasoning-gym task 'chain_sun'; did you mean chain_sum"),
        (["--task", "absent.jsonl"], "no file absent.jsonl: "),
        (["--k", "one"], "--k one: expected whole numbers, as in 1,4"),
        (["--k", "2"], "evaluate: ks=[2] with samples=1; pass@k needs 1 <= k <= samples"),
        (["--samples", "0"], "evaluate: got samples=0, limit=None; expected at least 1"),
        (["--holdout", "0"], "evaluate: got samples=1, limit=0; expected at least 1"),
        (["--max-tokens", "0"], "sampling: max_tokens is 0; expected a number from 1 to any"),
        (["--temperature", "-1"], "sampling: temperature is -1.0; expected a number from 0 to any"),
        (["--samples", "2", "--temperature", "0"], "evaluate: 2 samples at temperature 0 are all the same"),
        (["--seed", "-1"], "--seed is -1; expected a whole number from 0 to 4294967295"),
        (["--against", "absent.json"], "--against absent.json: cannot be read: "),
        (["--against", "broken.json"], "--against broken.json: no evaluation written by to_json: "),
    ],
)
def test_mistakes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "broken.json").write_text("{}")
    done = call(capsys, "evaluate", tiny, *([] if "--task" in arguments else ["--task", TASK]), *arguments)
    assert (done.code, done.out) == (1, "")
    assert done.error.startswith(f"error: {message}")


def test_no_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    done = evaluated(capsys, tmp_path)
    assert done.code == 1
    assert done.error.startswith(f"error: {tmp_path} is no model: no config.json in it")


def test_a_prompt_longer_than_the_context(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", {"prompt": "a", "answer": "b"}, {"prompt": "word " * 80, "answer": "b"})
    done = call(capsys, "evaluate", tiny, "--task", "{file: rows.jsonl, heldout: 2}")
    assert (done.code, done.out) == (1, "")
    assert "tokens and the model's context is 256" in done.error


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("output", ["absent/a.json", "/dev/full"])
def test_a_result_that_cannot_be_written_is_not_lost(
    capsys: pytest.CaptureFixture[str], tiny: Path, output: str
) -> None:
    done = evaluated(capsys, tiny, "--output", output)
    assert (done.code, done.out) == (1, "accuracy 0.0% [0.0, 39.0] (n=6)\n")
    reason = {"/dev/full": errno.ENOSPC, "absent/a.json": errno.ENOENT}[output]
    assert done.error == f"error: --output {output}: cannot be written: {os.strerror(reason)}"


def test_a_file_that_cannot_be_replaced_stays(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path) -> None:
    assert evaluated(capsys, tiny, "--output", "a.json").code == 0
    before = (tmp_path / "a.json").read_bytes()
    with files_of_at_most(1000):
        done = evaluated(capsys, tiny, "--seed", 1, "--output", "a.json")
    assert (done.code, (tmp_path / "a.json").read_bytes()) == (1, before)


def test_other_prompts_cannot_be_compared(capsys: pytest.CaptureFixture[str], tiny: Path) -> None:
    assert evaluated(capsys, tiny, "--output", "a.json").code == 0
    done = evaluated(capsys, tiny, "--holdout", 3, "--against", "a.json")
    assert done.code == 1
    assert done.error.startswith("error: cannot compare: chain_sum on 6 prompts and chain_sum on 3 have 3 in common")
