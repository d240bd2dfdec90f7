"""Comparing compressions: the figures of both models, resumed, joined by later methods; the statistics; the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import make_model, make_tokenizer
from posttrain import methods, tasks
from posttrain.cli.main import main
from posttrain.compress.calibrate import streams
from posttrain.compress.measure import model_bytes
from posttrain.compress.method import Calibrated
from posttrain.evaluation.perplexity import predict
from posttrain.models.causal import CausalPolicy
from posttrain.studies import compare_compressed as module
from posttrain.studies import compressed_page
from posttrain.studies.compare_compressed import compare_compressed
from posttrain.studies.compressed_comparison import (
    Before,
    CompressedComparison,
    Ratio,
    Run,
    factor,
    judge,
    resampled,
)
from posttrain.trajectory import PosttrainError

TEXT = "".join(chr(97 + (i * i) % 26) for i in range(1500))
ROWS = [{"prompt": f"p{i}", "answer": "a"} for i in range(20)]
LITTLE = Calibrated(samples=4, length=32)


def make_policy() -> CausalPolicy:
    return CausalPolicy(make_model(), make_tokenizer(), "tiny")


def made(name: str = "rtn", **arguments: Any) -> Any:
    return getattr(methods, name)(**{"group": 16, **arguments}).replace(calibration=LITTLE)


def compare(folder: Path, compressions: Any, **options: Any) -> CompressedComparison:
    policy = make_policy()
    return compare_compressed(
        policy, compressions, streams(policy, [TEXT]), folder=folder, **{"show": False, "seeds": 2, **options}
    )


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The jobs that were compressed."""
    jobs: list[tuple[str, int]] = []
    real = module.compressed_copy

    def counted(policy: Any, method: Any, *given: Any, seed: int, **options: Any) -> Any:
        jobs.append((method.name, seed))
        return real(policy, method, *given, seed=seed, **options)

    monkeypatch.setattr(module, "compressed_copy", counted)
    return jobs


def test_two_methods_on_one_text(tmp_path: Path, done: list) -> None:
    task = tasks.from_rows(ROWS, heldout=5, name="letters")
    compressions = {"rtn": made(bits=8), "two": made(bits=2)}
    found = compare(tmp_path / "c", compressions, task=task)
    assert done == [("rtn", 0), ("rtn", 0), ("rtn", 1), ("rtn", 1)]
    eight, two = found.methods
    policy = make_policy()
    unseen = streams(policy, [TEXT]).unseen(policy, LITTLE.length)
    assert found.before.perplexity.value == pytest.approx(predict(policy, unseen).perplexity)
    assert found.windows == len(unseen) == 4
    assert (found.before.size, found.before.bits) == (model_bytes(policy.model), 32)
    assert eight.bits == pytest.approx(8 + 24 / 16)
    assert eight.kl < 0.01 < two.kl
    assert eight.front
    assert two.front, "the fewest bits"
    assert two.size < eight.size < found.before.size
    assert eight.accuracy is not None
    assert eight.rate > 0
    assert [d.method for d in found.differences] == ["rtn"]
    assert found.remarks == ["the methods store from 3.12 to 9.50 bits a weight: read perplexity beside them"]
    kept = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert kept["sentence"] == found.sentence
    page = found.page.read_text()
    assert page.startswith("<!doctype html>")
    assert "rtn, two on tiny" in page
    assert (tmp_path / "c" / "pareto.svg").read_text().startswith("<?xml")
    assert (tmp_path / "c" / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_there_is_not_done_again(tmp_path: Path, done: list) -> None:
    first = compare(tmp_path / "c", {"a": made(bits=3), "b": made("gptq", bits=3)})
    done.clear()
    assert str(compare(tmp_path / "c", {"a": made(bits=3), "b": made("gptq", bits=3)})) == str(first)
    assert done == []
    (tmp_path / "c" / "a-seed1.json").write_text('{"cut sho')
    compare(tmp_path / "c", {"a": made(bits=3), "b": made("gptq", bits=4), "c": made(bits=4)}, seeds=3)
    assert done == [("gptq", 0), ("rtn", 0), ("rtn", 1), ("gptq", 1), ("rtn", 1), ("rtn", 2), ("gptq", 2), ("rtn", 2)]


@pytest.mark.parametrize("name", ["before.json", "a-seed0.json"])
def test_a_file_without_what_a_job_writes_is_written_anew(tmp_path: Path, done: list, name: str) -> None:
    first = compare(tmp_path / "c", {"a": made()}, seeds=1)
    file = tmp_path / "c" / name
    whole = json.loads(file.read_text())
    for lacking in [{}, *({k: v for k, v in whole.items() if k != key} for key in ("loss", "size"))]:
        file.write_text(json.dumps(lacking))
        again = compare(tmp_path / "c", {"a": made()}, seeds=1)
        assert again.methods[0].perplexity == first.methods[0].perplexity
        assert json.loads(file.read_text()).keys() == whole.keys()
    assert len(done) == (4 if name == "a-seed0.json" else 1)


def test_what_fails_in_a_job_names_its_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*given: Any, **options: Any) -> None:
        raise PosttrainError("q_proj holds weights that are not finite")

    monkeypatch.setattr(module, "compressed_copy", failing)
    with pytest.raises(PosttrainError, match=r"^a: q_proj holds weights that are not finite$"):
        compare(tmp_path / "c", {"a": made()})


def test_other_conditions_need_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(tmp_path / "c", {"a": made()}, seeds=1)
    with pytest.raises(PosttrainError, match=r"under other conditions: skipped \[\] \(now \['\*\.up_proj'\]\)"):
        compare(tmp_path / "c", {"a": made()}, seeds=1, skip=["*.up_proj"])
    policy = make_policy()
    with pytest.raises(PosttrainError, match=r"under other conditions: calibration .* text "):
        compare_compressed(
            policy, {"a": made()}, streams(policy, [TEXT[::-1]]), folder=tmp_path / "c", seeds=1, show=False
        )
    monkeypatch.chdir(tmp_path)
    found = compare(None, {"a": made()}, seeds=1)  # type: ignore[arg-type]
    assert found.folder.parts[0] == "runs"
    assert found.folder.name.startswith("compare-tiny-compressed-")


def test_a_model_that_predicts_nothing_finite_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.predict

    def broken(policy: Any, *given: Any, of: Any = None, **options: Any) -> Any:
        found = real(policy, *given, of=of, **options)
        if of is not None:
            found.loss[0] = math.nan
        return found

    monkeypatch.setattr(module, "predict", broken)
    with pytest.raises(PosttrainError, match="a, seed 0: what the compressed model predicts is not finite"):
        compare(tmp_path / "c", {"a": made()})


@pytest.mark.parametrize(
    ("compressions", "options", "message"),
    [
        ({}, {}, "compare: no method given"),
        ({"a": made()}, {"seeds": 0}, "compare: seeds is 0"),
        ({"a": made()}, {"seeds": 1 << 33}, "compare: the last seed is 8589934591; expected a whole number from 0 to"),
        ({"a": made(), "b": made(group=24)}, {}, "^b: group 24 does not divide"),
        ({"a": made(), "b": methods.quamba()}, {}, "^b: LlamaForCausalLM has no Mamba mixer to take apart"),
        ({"a": made()}, {"skip": ["*.nosuch"]}, r"^skip pattern '\*\.nosuch' matches no linear layer"),
        ({"a b": made(), "a/b": made()}, {}, "would share a file"),
        ({"a": made(group=24)}, {}, "group 24 does not divide"),
        ({"a": made()}, {"task": tasks.from_rows(ROWS, heldout=0)}, "has no held-out problems"),
    ],
)
def test_mistakes(tmp_path: Path, compressions: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PosttrainError, match=message):
        compare(tmp_path / "c", compressions, **options)
    assert not (tmp_path / "c").exists()


# -- what the runs say -------------------------------------------------------------------------------------------------


def runs_of(loss: np.ndarray, bits: float = 4.0) -> list[Run]:
    return [Run(seed, row, row / 10, None, bits, 1000, 1.0, 10.0) for seed, row in enumerate(loss)]


def judged(folder: Path, **losses: Any) -> CompressedComparison:
    width = next(iter(losses.values()))[0].shape[1]
    before = Before(np.full(width, 1.0), np.full(width, 10), None, 16.0, 4000, 20.0)
    made = {name: runs_of(loss, bits) for name, (loss, bits) in losses.items()}
    return judge(folder, "tiny", "a text", "another", None, before, made)


def test_a_clear_difference_is_told_and_noise_is_not(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    base = draw.normal(2.0, 0.5, (1, 40)).repeat(3, 0)
    found = judged(
        tmp_path,
        rtn=(base, 4.25),
        gptq=(base - 0.1 + draw.normal(0, 0.02, base.shape), 4.25),
        other=(base + draw.normal(0, 0.05, base.shape), 4.25),
    )
    assert [(d.method, d.other, d.real) for d in found.differences] == [
        ("rtn", "gptq", True),
        ("rtn", "other", False),
        ("gptq", "other", True),
    ]
    first = found.differences[0]
    assert first.ratio == pytest.approx(math.exp(0.1), abs=0.02)
    assert first.low < first.ratio < first.high
    assert found.sentence.startswith("gptq predicts better than rtn: its perplexity is lower by 9.")
    assert found.sentence.endswith("; the other difference is within the noise")
    assert not found.remarks
    assert [m.front for m in found.methods] == [False, True, False]
    assert str(found).splitlines()[0].split() == [
        "method", "perplexity", "over", "rtn", "p", "KL", "bits", "MB", "seconds", "tokens/s",
    ]  # fmt: skip


def test_the_sentence_is_about_methods_of_the_same_bits(tmp_path: Path) -> None:
    base = np.random.default_rng(0).normal(2.0, 0.5, (1, 40)).repeat(2, 0)
    found = judged(tmp_path, a=(base, 2.25), b=(base - 0.1, 2.3), c=(base - 1, 4.25), d=(base - 1, 4.25))
    assert found.sentence == (
        "b predicts better than a: its perplexity is lower by 9.52% [9.52, 9.52], "
        f"p = {found.differences[0].pvalue:.2g} after correction; "
        "the other difference at about the same bits is within the noise"
    )
    assert len(found.differences) == 6
    many = judged(tmp_path, **{name: (base - i / 5, 2.25) for i, name in enumerate("abcd")})
    assert many.sentence.endswith("; 2 more differences are real")


def test_one_seed_and_one_window(tmp_path: Path) -> None:
    found = judged(tmp_path, a=(np.array([[1.0, 2.0]]), 2.0), b=(np.array([[1.0, 2.0]]), 3.0))
    assert found.sentence.startswith("no difference in perplexity between the two methods is beyond the noise")
    assert found.sentence.endswith("(with one calibration: another may say otherwise)")
    single = judged(tmp_path, a=(np.array([[1.0], [1.1]]), 2.0), b=(np.array([[2.0], [2.1]]), 2.0))
    assert not single.differences[0].real
    assert single.remarks == ["the text has a single window, from which nothing can be said about other text"]
    assert "inf" in str(single)
    assert json.loads(single.to_json())["methods"][0]["perplexity"]["high"] is None
    compressed_page.write(single)


def test_the_bootstrap_covers_and_tests_at_its_level() -> None:
    """Of differences that are noise of seeds and windows, about one in twenty is called real, at most a few more."""
    draw = np.random.default_rng(1)
    wrong = 0
    for _ in range(200):
        table = draw.normal(0, 1, (4, 1)) * 0.3 + draw.normal(0, 1, (1, 30)) + draw.normal(0, 1, (4, 30)) * 0.5
        found = resampled(table, np.full(30, 7), draws=400)
        wrong += found.pvalue < 0.05
        assert found.low <= found.mean <= found.high
    assert wrong <= 16


def test_windows_count_by_their_tokens() -> None:
    found = resampled(np.array([[1.0, 4.0], [1.0, 4.0]]), np.array([30, 10]))
    assert found.mean == pytest.approx(1.75)
    assert (found.low, found.high) == (1.0, 4.0)


def test_ratios_are_told_the_other_way_round() -> None:
    d = Ratio("a", "b", 0.8, 0.75, 0.9, 0.001, 0.004)
    assert d.in_words() == (
        "a predicts better than b: its perplexity is lower by 20% [10, 25], p = 0.004 after correction"
    )
    assert factor(d) == ("1.250", "[1.111, 1.333]")
    assert Ratio("b", "a", 1.25, 1 / 0.9, 1 / 0.75, 0.001, 0.004).in_words() == d.in_words()
    assert factor(Ratio("b", "a", 3000.0, 2000.0, 8000.0, 0.001, 0.004)) == ("0.000333", "[0.000125, 0.0005]")


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["compare", *arguments])
    return code, *capsys.readouterr()


def test_the_command(capsys: pytest.CaptureFixture[str], saved: str, done: list) -> None:
    arguments = [
        "--methods", "rtn, gptq", "--model", saved, "--bits", "2,3", "--group", "16", "--calibration", "text.txt",
        "--seeds", "1", "--windows", "3", "--length", "32", "--folder", "c", "--set", "damping=0.1",
    ]  # fmt: skip
    code, out, err = call(capsys, *arguments)
    assert code == 0, err
    names = [line.split("  ")[0] for line in out.splitlines()[:6]]
    assert names == ["method", "float", "rtn 2 bits", "gptq 2 bits", "rtn 3 bits", "gptq 3 bits"]
    assert out.splitlines()[-1] == "page: c/compare.html"
    assert "gptq 2 bits, seed 0: perplexity" in err
    assert done == [("rtn", 0), ("gptq", 0), ("rtn", 0), ("gptq", 0)]
    assert call(capsys, *arguments)[1] == out
    assert len(done) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--methods": "rtn,grpo"}, "--methods: rtn compresses and grpo trains; compare one kind at a time"),
        ({"--methods": "rtn+gptq"}, "--methods rtn+gptq: compressions cannot be joined"),
        ({"--methods": "rtn,rtn"}, "--methods: rtn is given twice"),
        ({"--methods": "rtn,gtpq"}, "unknown method 'gtpq'; did you mean gptq"),
        ({"--budget": "1m"}, "--budget is for methods that train; these compress: leave it out"),
        ({"--steps": "3"}, "--steps is for methods that train; these compress: leave it out"),
        ({"--methods": "grpo", "--bits": "2"}, "--bits is for methods that compress; these train: leave it out"),
        ({"--methods": "grpo"}, "--budget is missing: what each run may spend in training"),
        ({"--bits": "two"}, "--bits two: expected whole numbers, as in 2,3,4"),
        ({"--bits": "9"}, "--bits 9: bits is 9; a uniform grid has 1 to 8"),
        ({"--windows": "0"}, "--windows 0: expected at least 1"),
        ({"--length": "0"}, "--length 0: expected at least 1"),
        ({"--methods": "", "--bits": "2"}, "--methods '': expected names such as grpo,riskpo or gptq,awq"),
        ({"--set": "dampign=1"}, "unknown argument of these methods 'dampign'; did you mean damping"),
        ({"--set": "damping=much"}, "--set damping=much: damping is 'much'; input should be a valid number"),
        ({"--calibration": "no.txt"}, "--calibration no.txt: no file no.txt; expected a file of text"),
        ({"--text": "nosuch"}, "--text nosuch: no file nosuch, and no task of that name"),
        ({"--task": "nosuch.jsonl"}, "no file nosuch.jsonl"),
        ({}, "no model at nosuch/: no such folder"),
    ],
)
def test_mistakes_on_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    given = {"--methods": "rtn,gptq", "--model": "nosuch/", **changes}
    code, out, err = call(capsys, *(part for pair in given.items() for part in pair))
    assert (code, out) == (1, "")
    assert err.startswith(f"posttrain: error: {message}")
    assert len(err.splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["text.txt"]
