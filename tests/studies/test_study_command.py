"""`posttrain study`: what is chosen, what is said and written, and mistakes."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import toy_studies

from posttrain.cli.main import main
from posttrain.studies import pages, registry, runner
from posttrain.studies.display import Display
from posttrain.studies.study import Arm, Study
from posttrain.studies.verdict import AtLeast


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of jobs and pages go to a folder of the test's own, never to the docs."""
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(pages, "docs_folder", lambda: None)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["study", *arguments])
    return code, *capsys.readouterr()


def test_from_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "toy_climb", "toy-same", "--jobs", "1")
    assert code == 0, err
    assert "toy-climb: A steeper slope leads higher." in out
    assert "height: steep higher than flat by more than 0.5" in out
    assert "3 seeds, 12 s of training, 16 rollouts a second" in out
    assert [line for line in out.splitlines() if line.startswith("verdict: ")] == ["verdict: holds", "verdict: fails"]
    assert "[1/6] toy-climb: flat, seed 0 (" in err
    assert len(err.splitlines()) == 6
    assert json.loads(Path("studies/toy-climb.json").read_text())["verdict"] == "holds"
    assert "2 studies: 1 holds, 1 fails" in Path("studies/README.md").read_text()
    shutil.rmtree("studies")
    code, again, err = call(capsys, "toy-climb", "toy-same")
    assert (code, again, err) == (0, out, ""), "nothing is run twice"
    assert Path("studies/toy-climb.svg").is_file()


def test_a_quick_run_writes_nothing_unless_told_where(capsys: pytest.CaptureFixture[str]) -> None:
    for job in runner.missing([runner.plan(registry.known("toy-climb"), quick=True)]):
        assert runner.carry_out(job) is None
    code, out, _ = call(capsys, "toy-climb", "--quick")
    assert code == 0
    assert out.splitlines()[-1] == "verdict: unclear (a quick run, which proves nothing)"
    assert not Path("studies").exists()
    assert call(capsys, "toy-climb", "--quick", "--output", "there")[0] == 0
    assert json.loads(Path("there/toy-climb.json").read_text())["quick"] is True


def test_a_quick_run_says_what_took_long(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "toy-climb", "toy-same", "--quick", "--jobs", "1")
    assert code == 0
    *jobs, total, slowest = err.splitlines()
    assert len(jobs) == 2
    assert re.fullmatch(r"jobs of 1 studies took \d+ s, most of it:", total)
    assert re.fullmatch(r" +\d+\.\d s  toy-climb", slowest)
    assert call(capsys, "toy-climb", "--quick")[2] == "", "nothing ran"


def test_a_failure_is_one_line_and_the_rest_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "toy-raise", "--jobs", "1")
    assert (code, out) == (1, "")
    lines = [line for line in err.splitlines() if "failed" in line]
    assert lines[0].startswith("toy-raise: raise, seed 1: failed: ValueError: the ground is gone (traceback: ")
    assert lines[1].startswith("posttrain: error: failed: toy-raise: raise, seed 1; what is done is kept")
    assert len(lines) == 2
    assert [job.arm for job in runner.missing([runner.plan(registry.known("toy-raise"))])] == ["raise"]


def test_a_study_that_is_broken_takes_no_other_along(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_STUDIES", dict(registry._STUDIES))
    flat = {"flat": Arm(toy_studies.climb, {"slope": toy_studies.Slope(0.0)})}

    @registry.study(method="grpo", card="046")
    def toy_unmeasured() -> Study:
        """It expects what nobody measures."""
        return Study("c", "s", flat, (AtLeast("flat", "heigth", 0.0),))

    @registry.study(method="grpo", card="046")
    def toy_unbuilt() -> Study:
        """It cannot be built."""
        return Study("c", "s", {}, ())

    for job in runner.missing([runner.plan(registry.known(n)) for n in ("toy-climb", "toy-unmeasured")]):
        assert runner.carry_out(job) is None
    code, out, err = call(capsys, "toy-unmeasured", "toy-unbuilt", "toy-climb")
    assert code == 1
    assert "verdict: holds" in out
    assert err.splitlines() == [
        "toy-unbuilt: failed: PosttrainError: a study needs arms and expectations; a claim that nothing is expected of "
        "is no claim",
        "toy-unmeasured: failed: the arm flat has no figure 'heigth'; it measured height",
        "posttrain: error: 2 failures: toy-unbuilt, ...; what is done is kept: mend this and run the same command "
        "again",
    ]


def test_fresh_runs_again(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for job in runner.missing([runner.plan(registry.known("toy-same"))]):
        assert runner.carry_out(job) is None
    ran = []

    def run(jobs, *rest):
        ran.extend(jobs)
        yield from ()

    monkeypatch.setattr(runner, "run", run)
    assert call(capsys, "toy-same")[0] == 0
    assert ran == []
    call(capsys, "toy-same", "--fresh")
    assert len(ran) == 3


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--list")
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("toy-same "))
    assert line.split() == [
        "toy-same", "policy-gradient", "nothing,", "grpo", "046,", "030", "none", "The", "steep", "arm", "of", "the",
        "other", "study,", "shared.",
    ]  # fmt: skip
    assert "toy-climb" in call(capsys, "--list", "--family", "policy-gradient")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toy-clim"], "unknown study 'toy-clim'; did you mean toy-climb"),
        (["--family", "policy-gradien"], "unknown family 'policy-gradien'; did you mean policy-gradient?"),
        ([], "no study given: expected names, --family F or --all"),
        (["toy-climb", "--all"], "names of studies, --family and --all are three ways to choose; give one of them"),
        (["toy-climb", "--seeds", "2"], "--seeds 2: expected at least 3"),
        (["toy-climb", "--quick", "--seeds", "0"], "--seeds 0: expected at least 1"),
        (["toy-climb", "--jobs", "0"], "--jobs 0: expected at least 1"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (1, "")
    assert err.startswith(f"posttrain: error: {message}")
    assert len(err.splitlines()) == 1


def test_the_slowest_studies() -> None:
    out = io.StringIO()
    display = Display(0, out)
    display.seconds.update({f"study-{i}": i + 0.25 for i in range(30)})
    display.summary()
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["jobs of 30 studies took 442 s, most of it:", "    29.2 s  study-29"]
    assert len(lines) == 21


def test_the_bars_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    job, other = runner.missing([runner.plan(registry.known("toy-climb"))])[:2]
    with Display(2, out) as display:
        display.started(job)
        display.finished(job, None)
        display.started(other)
        with display.aside():
            out.write("a table\n")
        display.finished(other, "it broke")
    text = out.getvalue()
    assert "jobs" in text
    assert "1/2" in text
    assert "toy-climb: flat, seed 0" in text
    assert "toy-climb: steep, seed 0: failed: it broke" in text
