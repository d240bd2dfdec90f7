"""Jobs: run once, shared, resumed after a kill; and what becomes of those that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import toy_studies  # noqa: F401 - registers them

from posttrain.studies import registry, runner
from posttrain.studies.study import Arm, Measured, Study
from posttrain.studies.verdict import AtLeast
from posttrain.trajectory import PosttrainError

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where results of jobs are kept."""
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def plan(name: str, seeds: int | None = None, quick: bool = False) -> runner.Plan:
    return runner.plan(registry.known(name), seeds, quick)


def carry_out(*plans: runner.Plan) -> list[str | None]:
    """Run what is missing in this process."""
    return [runner.carry_out(job) for job in runner.missing(plans)]


def test_a_study_in_worker_processes() -> None:
    climb = plan("toy-climb", seeds=2)
    assert climb.records() is None
    started: list[runner.Job] = []
    done = list(runner.run(runner.missing([climb]), 2, started.append))
    assert [error for _, error in done] == [None] * 4
    assert {job for job, _ in done} == set(started)
    assert [(job.arm, job.seed) for job in started] == [("flat", 0), ("steep", 0), ("flat", 1), ("steep", 1)]
    records = climb.records()
    assert records is not None
    assert [r.measured.figures for r in records["steep"]] == [{"height": 4.0}, {"height": 4.01}]
    assert records["steep"][1].measured.curves["height"][0] == {"step": 0, "value": 0.01, "tokens": 0}
    assert records["steep"][0].machine.startswith("1 thread of ") or "NVIDIA" in records["steep"][0].machine
    assert records["steep"][0].versions["torch"].startswith("2.")
    assert list(runner.run(runner.missing([climb]), 2)) == []


def test_only_what_is_missing_runs() -> None:
    assert carry_out(plan("toy-climb", seeds=2)) == [None] * 4
    more = plan("toy-climb")
    assert [(job.arm, job.seed) for job in runner.missing([more])] == [("flat", 2), ("steep", 2)]
    assert len(runner.missing([plan("toy-climb", quick=True)])) == 2, "a quick run is another run"
    runner.forget([plan("toy-climb", seeds=1)])
    assert len(runner.missing([more])) == 4


def test_arms_that_studies_share_run_once() -> None:
    both = [plan("toy-climb"), plan("toy-same")]
    assert len(runner.missing(both)) == 6
    assert carry_out(*both) == [None] * 6
    records = plan("toy-same").records()
    assert records is not None
    assert [r.measured.figures["height"] for r in records["up"]] == [4.0, 4.01, 4.02]


def test_the_first_job_of_every_model_goes_first(one_arm) -> None:
    each = one_arm(draw, seeds=1, quick=True)
    arms = {name: Arm(draw, {"model": name[0]}) for name in ("a1", "a2", "b1", "b2")}
    jobs = {name: [replace(each.jobs["only"][0], arm=name, key=name)] for name in arms}
    expected = (AtLeast("a1", "sum", 0.0),)
    each = replace(each, study=replace(each.study, arms=arms, expectations=expected), jobs=jobs)
    found = runner.models_first(runner.missing([each]), [each])
    assert [job.arm for job in found] == ["a1", "b1", "a2", "b2"]


def test_failures_take_only_their_own_job_along(home: Path) -> None:
    jobs = runner.missing([plan("toy-raise", seeds=2), plan("toy-die", seeds=2)])
    wanted = [job for job in jobs if job.seed == 1]
    assert [job.arm for job in wanted] == ["raise", "walk", "die"]
    found = {job.arm: error for job, error in runner.run(wanted, 1)}
    assert found["walk"] is None
    assert found["die"] == "its process ended without a word (SIGKILL: out of memory, perhaps)"
    raised = found["raise"] or ""
    assert raised.startswith("ValueError: the ground is gone (traceback: ")
    traceback = (home / "studies" / f"{wanted[0].key}.error").read_text()
    assert "in stumble" in traceback
    assert str(wanted[0]) == "toy-raise: raise, seed 1"


def test_killed_and_started_again_it_runs_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    log.mkdir()
    monkeypatch.setenv("TOY_LOG", str(log))
    program = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import toy_studies\n"
        "from posttrain.studies import registry, runner\n"
        "list(runner.run(runner.missing([runner.plan(registry.known('toy-wait'), 2)]), 1))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    try:
        waiting = _appears(log, "wait-1-*")
    finally:
        parent.kill()
        parent.wait()
    worker = int(waiting.name.rpartition("-")[2])
    deadline = time.monotonic() + 20
    while _alive(worker):
        assert time.monotonic() < deadline, "the worker outlives its parent"
        time.sleep(0.05)
    again = plan("toy-wait", seeds=2)
    assert [(job.arm, job.seed) for job in runner.missing([again])] == [("wait", 1), ("walk", 1)]
    monkeypatch.setenv("TOY_WAIT", "0")
    assert carry_out(again) == [None, None]
    assert again.records() is not None
    assert sorted(file.name.rpartition("-")[0] for file in log.iterdir()) == [
        "wait-0", "wait-1", "wait-1", "walk-0", "walk-1",
    ]  # fmt: skip


def test_leaving_the_iteration_ends_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_LOG", str(tmp_path))
    jobs = runner.missing([plan("toy-wait", seeds=2)])
    finished = runner.run([job for job in jobs if job.arm == "wait"], 1)
    assert next(finished)[1] is None
    worker = int(_appears(tmp_path, "wait-0-*").name.rpartition("-")[2])
    assert _alive(worker)
    finished.close()
    assert not _alive(worker)


def test_a_job_whose_code_was_edited_meanwhile_is_refused() -> None:
    (job, *_) = runner.missing([plan("toy-climb")])
    error = runner.carry_out(replace(job, key="0" * 32))
    assert error == "its code was edited while the study ran, or differs between processes; start it again"
    assert runner.kept("0" * 32) is None


def test_a_file_that_is_cut_short_counts_as_missing(home: Path) -> None:
    assert carry_out(plan("toy-climb", seeds=1)) == [None, None]
    (job, *_) = plan("toy-climb", seeds=1).jobs["flat"]
    file = home / "studies" / f"{job.key}.json"
    file.write_text(file.read_text()[:-5])
    assert runner.missing([plan("toy-climb", seeds=1)]) == [job]
    file.write_text(json.dumps({"measured": {}}))
    assert runner.missing([plan("toy-climb", seeds=1)]) == [job]


def draw(seed: int, quick: bool) -> Measured:
    import random

    import numpy as np
    import torch

    return Measured({"sum": random.random() + float(np.random.rand()) + float(torch.rand(()))})  # noqa: NPY002


def nothing(seed: int, quick: bool) -> None:
    return None


@pytest.fixture
def one_arm(monkeypatch: pytest.MonkeyPatch):
    """Plans a study of one arm."""
    monkeypatch.setattr(registry, "_STUDIES", dict(registry._STUDIES))

    def make(run, **options) -> runner.Plan:
        def one() -> Study:
            """One arm."""
            return Study("c", "s", {"only": Arm(run)}, (AtLeast("only", "sum", 0.0),))

        registry.study(method="grpo", card="046", name="one")(one)
        return runner.plan(registry.known("one"), **options)

    return make


def test_forgotten_generators_are_seeded_too(one_arm) -> None:
    found = []
    for _ in range(2):
        each = one_arm(draw, seeds=2)
        runner.forget([each])
        assert carry_out(each) == [None, None]
        records = each.records()
        assert records is not None
        found.append([r.measured.figures["sum"] for r in records["only"]])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]
    assert records["only"][0].measured.seconds > 0, "the job's own time where the arm gives none"


def test_an_arm_must_return_what_it_measured(one_arm) -> None:
    assert carry_out(one_arm(nothing, seeds=1)) == ["the arm returned NoneType; expected Measured"]


def haste(seed: int, quick: bool) -> Measured:
    from posttrain.lab.haste import is_hasty

    return Measured({"sum": float(is_hasty())})


def test_only_quick_jobs_are_given_hasty_models(one_arm) -> None:
    from posttrain import lab

    found = {}
    for quick in (True, False):
        each = one_arm(haste, seeds=1, quick=quick)
        with lab.hasty(not quick):  # whatever is asked for around it
            assert carry_out(each) == [None]
        records = each.records()
        assert records is not None
        found[quick] = records["only"][0].measured.figures["sum"]
    assert found == {True: 1.0, False: 0.0}


def test_what_quick_jobs_make_of_models_takes_few_steps() -> None:
    from posttrain import lab, methods
    from posttrain.lab.haste import STEPS
    from posttrain.studies.arms import in_lab

    with lab.hasty():
        assert in_lab(methods.sft(), steps=400).settings.steps == STEPS
    assert in_lab(methods.sft(), steps=400).settings.steps == 400


def test_seeds_below_one_are_refused() -> None:
    with pytest.raises(PosttrainError, match="seeds is 0; expected at least 1"):
        plan("toy-climb", seeds=0)


def _appears(folder: Path, pattern: str) -> Path:
    deadline = time.monotonic() + 60
    while not (found := list(folder.glob(pattern))):
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.02)
    return found[0]


def _alive(process: int) -> bool:
    """Running, and no zombie that nobody has waited for."""
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat")
        return not state.is_file() or state.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
