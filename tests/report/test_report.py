"""The report without a browser: reading broken folders, thinning, wording, escaping, and that it is written whole."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_run import HACK, append, write_run

from posttrain import report
from posttrain.report import curves, document, folder, page, results, thin
from posttrain.trajectory import PosttrainError

values = st.lists(st.none() | st.floats(-1e6, 1e6), max_size=200)


def rows_of(*pairs: tuple[int, int], **fields) -> list[folder.Row]:
    return [{"stage": stage, "step": step, **fields} for stage, step in pairs]


def without_scripts(html: str) -> str:
    return re.sub(r"<script\b[^>]*>.*?</script>", "", html, flags=re.DOTALL)


# Reading a run folder


def test_a_folder_without_run_json_is_refused(tmp_path: Path):
    with pytest.raises(PosttrainError, match=r"is not a run folder: no run\.json in it"):
        report.build(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("content", "message"), [("{", "is not JSON"), ("[]", "holds a list")])
def test_a_run_json_that_is_none_is_refused(tmp_path: Path, content: str, message: str):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(PosttrainError, match=message) as caught:
        report.build(tmp_path)
    assert "\n" not in str(caught.value)


def test_run_json_alone_suffices_and_each_section_says_what_is_missing(tmp_path: Path):
    (tmp_path / "run.json").write_text("{}")
    text = report.build(tmp_path).read_text(encoding="utf-8")
    for file in ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl", "recipe.yaml"):
        assert f"the run folder holds no {file}." in text


def test_empty_logs_are_told_from_missing_ones(tmp_path: Path):
    run = write_run(tmp_path)
    for file in ("metrics", "samples", "evaluations"):
        (run / f"{file}.jsonl").write_text("")
    text = report.build(run).read_text(encoding="utf-8")
    for words in ("metrics.jsonl holds no step", "samples.jsonl holds none", "evaluations.jsonl tells no accuracy"):
        assert words in text


def test_a_last_line_cut_short_is_left_out_and_said(tmp_path: Path):
    run = write_run(tmp_path)
    whole = folder.read(run)
    append(run / "metrics.jsonl", '{"stage": 1, "name": "grpo", "st')
    cut = folder.read(run)
    assert cut.metrics == whole.metrics
    assert cut.problems == ["metrics.jsonl: the last line (line 81) was cut short and left out."]
    assert cut.problems[0] in report.build(run).read_text(encoding="utf-8")


def test_unreadable_lines_in_the_middle_are_counted(tmp_path: Path):
    run = write_run(tmp_path)
    append(run / "samples.jsonl", 'nonsense\n[1, 2]\n\n{"stage": 1, "step": 41, "prompt": "last"}\n')
    found = folder.read(run)
    assert found.samples is not None
    assert found.samples[-1]["prompt"] == "last"
    assert found.problems == ["samples.jsonl: 2 unreadable lines were left out (the first is line 401)."]


def test_a_step_that_a_resumed_run_logged_again_counts_once(tmp_path: Path):
    run = write_run(tmp_path)
    append(run / "metrics.jsonl", '{"stage": 1, "step": 40, "reward": 0.25}\n{"stage": 1, "step": 41, "reward": 1}\n')
    found = folder.read(run)
    assert found.metrics is not None
    assert [(row["step"], row["reward"]) for row in found.metrics[-2:]] == [(40, 0.25), (41, 1)]
    assert len(found.metrics) == 81
    assert found.problems == ["metrics.jsonl: 1 steps were logged again (a resumed run); the later account counts."]


def test_an_evaluation_logged_after_its_step_joins_it(tmp_path: Path):
    run = write_run(tmp_path)
    append(run / "metrics.jsonl", '{"stage": 1, "step": 40, "time": 99.5, "heldout_accuracy": 0.5}\n')
    found = folder.read(run)
    assert found.metrics is not None
    assert len(found.metrics) == 80
    assert (found.metrics[-1]["reward"], found.metrics[-1]["heldout_accuracy"]) == (1.0, 0.5)
    assert found.problems == []


@pytest.mark.parametrize("bad", [None, True, "3", float("nan"), float("-inf"), 10**400, [1]])
def test_what_is_no_finite_number_is_none(bad):
    assert folder.number(bad) is None


def test_stages_that_share_a_name_are_numbered(tmp_path: Path):
    run = {"stages": [{"index": 0, "name": "sft"}, {"index": 1, "name": "dpo"}, {"index": 2, "name": "sft"}]}
    assert [s.label for s in folder.RunFolder(tmp_path, run).stages] == ["sft (1)", "dpo", "sft (3)"]


def test_stages_come_from_the_metrics_where_run_json_names_none(tmp_path: Path):
    metrics = rows_of((0, 1), name="sft") + rows_of((1, 1), name="grpo")
    assert [s.label for s in folder.RunFolder(tmp_path, {}, metrics=metrics).stages] == ["sft", "grpo"]


def test_what_a_stage_that_compresses_came_to(tmp_path: Path):
    told = {"bits": 4.1562, "bytes_before": 84_100_000, "bytes_after": 23_400_000}
    stages = [{"index": 0, "name": "gptq", "kind": "compression", "steps": None, "compression": told}]
    found = folder.RunFolder(tmp_path, {"model": "m", "stages": stages})
    assert [s.size for s in found.stages] == ["4.16 bits a weight, 84.1 → 23.4 MB"]
    assert results.headline(found) == "m: compressed by gptq, without an evaluation"
    text = without_scripts(page.render(found))
    assert "<td>4.16 bits a weight, 84.1 → 23.4 MB</td>" in text
    broken = {"index": 0, "name": "gptq", "compression": {"bits": "?"}}
    other = folder.RunFolder(tmp_path, {"stages": [broken, {"name": "sft", "compression": 3}]})
    assert [s.size for s in other.stages] == ["", ""]
    assert '<th scope="col">size</th>' not in page.render(other)


# Thinning


@settings(deadline=None)
@given(count=st.integers(0, 300), limit=st.integers(0, 100))
def test_spread_is_even_and_within_its_limit(count: int, limit: int):
    kept = thin.spread(count, limit)
    assert len(kept) == len(set(kept)) == min(count, limit)
    assert kept == sorted(kept)
    if kept:
        assert kept[-1] == count - 1
    gaps = [b - a for a, b in itertools.pairwise(kept)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=30), limit=st.integers(1, 100))
def test_thinned_samples_keep_their_order_and_the_last_step(sizes: list[int], limit: int):
    samples = [{"stage": 0, "step": step, "id": (step, k)} for step, size in enumerate(sizes) for k in range(size)]
    kept = thin.thin_samples(samples, limit)
    assert len(kept) == min(limit, len(samples))
    assert [row["id"] for row in kept] == sorted(row["id"] for row in kept)
    last = [row for row in kept if row["step"] == len(sizes) - 1]
    assert len(last) == min(limit, sizes[-1]) or len(samples) <= limit


@settings(deadline=None)
@given(line=values, limit=st.integers(4, 60))
def test_a_thinned_curve_keeps_its_extremes_and_ends(line: list[float | None], limit: int):
    kept = thin.keep_peaks(line, limit)
    assert len(kept) <= limit
    assert kept == sorted(set(kept))
    finite = [value for value in line if value is not None]
    shown = [value for i in kept if (value := line[i]) is not None]
    if finite:
        assert (min(shown), max(shown)) == (min(finite), max(finite))
    if line:
        assert {0, len(line) - 1} <= set(kept)


def test_a_gap_in_a_thinned_curve_stays_a_gap():
    line = [1.0] * 40 + [None] * 40 + [2.0] * 40
    kept = thin.keep_peaks(line, 20)
    assert any(line[i] is None for i in kept)


def test_the_page_says_how_many_samples_were_left_out(tmp_path: Path):
    text = report.build(write_run(tmp_path), samples=100).read_text(encoding="utf-8")
    assert "100 of 400 samples are here" in text
    assert "300 were left out" in text
    data = re.search(r'id="samples-data">(.*?)</script>', text)
    assert data is not None
    kept = json.loads(data[1])
    assert len(kept) == 100
    assert sum(row["step"] == 40 for row in kept) == 10


def test_long_completions_leave_room_for_fewer_samples(tmp_path: Path, monkeypatch):
    found = folder.read(write_run(tmp_path))
    characters = sum(len(s["prompt"]) + len(s["completion"]) + len(str(s["answer"])) for s in found.samples or [])
    monkeypatch.setattr(page, "CHARACTERS", characters // 4 + 1)
    assert "100 of 400 samples are here" in page.render(found)


# The headline and the results


def test_the_headline_tells_the_story(tmp_path: Path):
    run = write_run(tmp_path, model="/models/smollm2-135m/")
    expected = "smollm2-135m on chain_sum: held-out accuracy 5% [3, 9] → 62% [55, 69] in 11 min by sft, grpo"
    assert results.headline(folder.read(run)) == expected


@pytest.mark.parametrize(
    ("rows", "status", "expected"),
    [
        ([], "failed", "m on t: trained by sft, without an evaluation (failed)"),
        (["before"], "running", "m on t: held-out accuracy 20% before training, none yet after it; by sft (running)"),
        (["after sft"], "finished", "m on t: held-out accuracy 20% after sft by sft"),
    ],
)
def test_the_headline_of_a_run_that_lacks_something(tmp_path: Path, rows: list[str], status: str, expected: str):
    run = {"model": "m", "task": {"reasoning_gym": "t"}, "status": status, "stages": [{"index": 0, "name": "sft"}]}
    told = [{"label": label, "accuracy": 0.2} for label in rows]
    assert results.headline(folder.RunFolder(tmp_path, run, evaluations=told)) == expected


def test_the_headline_speaks_of_the_task_that_was_trained(tmp_path: Path):
    told = [
        {"label": label, "task": task, "accuracy": accuracy}
        for label, task, accuracy in [
            ("before", "other", 0.9), ("before", "t", 0.1), ("after", "t", 0.3), ("after", "other", 0.8),
        ]
    ]  # fmt: skip
    found = folder.RunFolder(tmp_path, {"model": "m", "task": "t"}, evaluations=told)
    assert "10% → 30%" in results.headline(found)


def test_a_repeated_evaluation_counts_by_its_last_account(tmp_path: Path):
    told = [{"label": "before", "accuracy": 0.1}, {"label": "before", "accuracy": 0.2}]
    found = results.evaluations(folder.RunFolder(tmp_path, {}, evaluations=told))
    assert [row.accuracy.value for row in found] == [0.2]


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (results.Interval(0.62, 0.55, 0.69), "62% [55, 69]"),
        (results.Interval(0.5, 0.495, 0.5051), "50.0% [49.5, 50.5]"),
        (results.Interval(0.5, None, None), "50%"),
    ],
)
def test_an_interval_in_words(interval: results.Interval, expected: str):
    assert str(interval) == expected


@pytest.mark.parametrize(
    ("low", "high", "p", "expected"),
    [
        (0.5, 0.64, 1e-9, "A rise: +57.0 percentage points [+50.0, +64.0], p < 0.001, 200 problems."),
        (-0.1, 1.0, 0.2, "No clear difference: +57.0 percentage points [-10.0, +100.0], p = 0.200, 200 problems."),
        (None, None, None, "+57.0 percentage points, 200 problems."),
    ],
)
def test_a_comparison_in_words(tmp_path: Path, low, high, p, expected: str):
    row = {"label": "comparison", "difference": 0.57, "low": low, "high": high, "p": p, "n": 200}
    assert results.comparisons(folder.RunFolder(tmp_path, {}, evaluations=[row])) == [expected]


@pytest.mark.parametrize(("seconds", "expected"), [(42, "42 s"), (665, "11 min"), (9000, "2 h 30 min"), (0, "")])
def test_the_duration_falls_back_on_the_last_step(tmp_path: Path, seconds: int, expected: str):
    found = folder.RunFolder(tmp_path, {"finished": None}, metrics=[{"step": 1, "time": seconds}])
    assert results.duration(found) == expected


def test_bars_carry_the_interval_and_pass_at_k(tmp_path: Path):
    row = {"label": "before", "stage": -1, "accuracy": 0.2, "low": 0.15, "high": 0.3}
    row |= {"pass_at_k": {"16": {"value": 0.6}, "4": {"value": 0.4, "low": 0.3, "high": 0.5}}}
    found = results.evaluations(folder.RunFolder(tmp_path, {}, evaluations=[row]))
    figure = results.before_after(found, {})
    assert list(figure.data[0].x) == [0.2, 0.4, 0.6]
    assert figure.data[0].error_x.array == pytest.approx([0.1, 0.1, 0.0])
    assert figure.data[0].error_x.arrayminus == pytest.approx([0.05, 0.1, 0.0])
    assert list(figure.layout.yaxis.ticktext) == ["accuracy, before", "pass@4, before", "pass@16, before"]


def test_names_in_figures_are_no_links():
    link = '<a href="http://example.org">sft</a>'
    row = {"label": link, "stage": 0, "step": 1, "accuracy": 0.5, "reward": 1.0}
    found = folder.RunFolder(Path("run"), {"stages": [{"name": link}]}, metrics=[row], evaluations=[row])
    (panel,) = [panel for panel in curves.panels([row], found.stages) if panel.key == "reward"]
    assert panel.figure is not None
    assert "<a" not in str(panel.figure.to_dict())
    assert "<a" not in str(results.before_after(results.evaluations(found), {}).to_dict())


# The curves


def test_main_curves_come_first_and_unknown_metrics_are_kept(tmp_path: Path):
    found = folder.read(write_run(tmp_path))
    panels = curves.panels(found.metrics or [], found.stages)
    assert [panel.title for panel in panels if panel.main] == [
        "Reward", "Reward: format", "Loss, sft", "Loss, grpo", "Entropy", "KL divergence", "Completion length",
        "Clip fraction", "Tokens per second",
    ]  # fmt: skip
    assert [panel.key for panel in panels if not panel.main] == ["gate_open", "grad_norm", "tokens"]


def test_a_curve_has_every_value_at_its_step(tmp_path: Path):
    metrics = [{"stage": 0, "step": 3 * i, "reward": float(i)} for i in range(1, 6)]
    (panel,) = curves.panels(metrics, [folder.Stage(0, "grpo")])
    assert panel.figure is not None
    (trace,) = panel.figure.data
    assert (list(trace.x), list(trace.y)) == ([3, 6, 9, 12, 15], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert (panel.last, panel.gaps) == ("5", "")


def test_values_that_are_not_finite_are_gaps_and_said(tmp_path: Path):
    log = tmp_path / "metrics.jsonl"
    log.write_text(
        "".join(
            f'{{"stage": 0, "step": {i}, "kl": {v}}}\n' for i, v in enumerate(["1", "NaN", "null", "-Infinity", "2"])
        )
    )
    (tmp_path / "run.json").write_text("{}")
    (panel,) = curves.panels(folder.read(tmp_path).metrics or [], [])
    assert panel.figure is not None
    assert list(panel.figure.data[0].y) == [1.0, None, None, None, 2.0]
    assert panel.gaps == "no finite value at 3 of 5 steps"


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_metric_that_was_never_finite_has_no_figure_but_is_named(value):
    (panel,) = curves.panels([{"step": 1, "loss": value}], [])
    assert panel.title == "Loss"
    assert panel.figure is None
    assert panel.gaps == "no finite value at 1 of 1 steps"


def test_counts_run_on_over_the_stages():
    assert curves.since_start(rows_of((0, 1), (0, 2), (1, 1), (1, 9), (2, 1)), "step") == [1, 2, 3, 11, 12]


def test_axes_are_steps_minutes_and_tokens_since_the_start():
    metrics: list[folder.Row] = [
        {"stage": 0, "step": 1, "time": 60.0, "tokens": 10},
        {"stage": 0, "step": 2, "tokens": 15},
        {"stage": 1, "step": 1, "time": 120, "tokens": 20},
    ]
    assert [(axis.key, axis.values) for axis in curves.axes(metrics)] == [
        ("step", [1.0, 2.0, 3.0]),
        ("time", [1.0, None, 3.0]),
        ("tokens", [10.0, 15.0, 35.0]),
    ]
    assert [axis.key for axis in curves.axes(rows_of((0, 1)))] == ["step"]


def test_the_rolling_mean_by_hand():
    assert curves.rolling_mean([1.0, 2.0, None, 6.0, 8.0], 3) == [1.5, 1.5, None, 7.0, 7.0]


# The page


@settings(deadline=None)
@given(st.recursive(st.none() | st.text() | st.integers(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_embedded_json_says_the_same_and_can_end_no_script(value):
    text = document.embed(value)
    assert json.loads(text) == value
    assert text.isascii()
    assert not set(text) & set("<>&")


def test_embedded_numbers_that_json_lacks_are_null():
    assert document.embed({"a": [float("nan"), float("inf"), 1.5]}) == '{"a":[null,null,1.5]}'


def test_hostile_text_never_becomes_markup(tmp_path: Path):
    run = write_run(tmp_path, names=("sft", HACK), model=HACK, task=HACK, notes=[HACK], command=HACK, status=HACK)
    sample = {"stage": 1, "step": 41, "split": HACK, "finish": HACK, "reward": 1.0, "rewards": {HACK: 1, "b": 0}}
    append(run / "samples.jsonl", json.dumps(sample | dict.fromkeys(("prompt", "completion", "answer"), HACK)))
    append(run / "metrics.jsonl", json.dumps({"stage": 1, "step": 41, HACK: 1.0}))
    append(run / "evaluations.jsonl", json.dumps({"label": HACK, "task": HACK, "accuracy": 0.5}))
    append(run / "recipe.yaml", HACK)
    text = report.build(run).read_text(encoding="utf-8")
    assert "<script>window.hacked" not in text
    assert "<img" not in without_scripts(text)
    assert len(re.findall(r"<script\b", without_scripts(text))) == 0
    assert without_scripts(text).count("&lt;script&gt;window.hacked=1") >= 6


def test_the_page_loads_nothing_and_runs_its_own_scripts_alone(tmp_path: Path):
    text = report.build(write_run(tmp_path)).read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)\s*=\s*(?!\"data:,\")|@import|url\(", without_scripts(text))
    scripts = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    assert len(scripts) == 3
    assert sum("plotly.js v" in script for script in scripts) == 1
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src &#39;none&#39;")
    for script in scripts:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy[1]


def test_the_page_holds_what_was_run(tmp_path: Path):
    text = without_scripts(report.build(write_run(tmp_path)).read_text(encoding="utf-8"))
    for words in (
        "62% [55, 69]",
        "A rise: +57.0",
        "3 rows skipped",
        "posttrain run recipe.yaml",
        "rows: 600",
        "2.13.0",
    ):
        assert words in text


def test_odd_values_are_shown_and_do_not_break_the_page(tmp_path: Path):
    (tmp_path / "run.json").write_text(
        '{"name": "\\ud800", "stages": [1, {"steps": "x"}], "versions": 3, "notes": "n"}'
    )
    (tmp_path / "samples.jsonl").write_text(
        '{"prompt": [{"role": "user"}], "reward": NaN, "rewards": 1, "answer": 3}\n'
    )
    (tmp_path / "metrics.jsonl").write_text('{"step": "x", "loss": true}\n')
    (tmp_path / "evaluations.jsonl").write_text('{"accuracy": "x"}\n{"label": "comparison"}\n')
    text = report.build(tmp_path).read_text(encoding="utf-8")
    assert r"{\n  \"role\": \"user\"\n }" in text
    assert '"reward":null' in text


def test_a_failing_build_leaves_the_older_report(tmp_path: Path, monkeypatch):
    run = write_run(tmp_path)
    (run / "report.html").write_text("older")
    before = sorted(run.iterdir())

    def refuse(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="no space left"):
            report.build(run)
    assert (run / "report.html").read_text() == "older"
    assert sorted(run.iterdir()) == before
    assert report.build(run).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(run.iterdir()) == before
