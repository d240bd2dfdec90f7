"""`posttrain methods`, `posttrain models` and `posttrain report`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import call

from posttrain import methods
from posttrain.cli import taxonomy_tree
from posttrain.methods import registry, verdicts
from posttrain.methods.registry import Entry
from posttrain.methods.taxonomy import taxonomy
from posttrain.models import load
from posttrain.objective.estimator import Objective
from posttrain.objective.mixture import Mixture, Term

KEYS = ["name", "family", "card", "kind", "parts", "verdict", "summary", "branch"]


@pytest.fixture
def studied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Verdicts of our own in the place of the package's; returns their file, which may be written anew at once."""
    file = tmp_path / "studies" / "verdicts.json"
    file.parent.mkdir()
    outcome = {"methods": ["grpo", "dapo"], "card": "046", "claim": "It learns.", "seeds": 3, "date": "2026-01-02"}
    outcomes = {
        "learning": {**outcome, "verdict": "holds", "effect": "+4.1 points [1.0, 7.2]"},
        "filtering": {**outcome, "methods": ["dapo"], "verdict": "fails", "effect": "-1 point [-2, 0]"},
    }
    file.write_text(json.dumps(outcomes))
    monkeypatch.setattr(verdicts, "files", lambda name: tmp_path)
    verdicts.verdicts.cache_clear()
    yield file
    verdicts.verdicts.cache_clear()


def test_list_as_json(capsys: pytest.CaptureFixture[str], studied: Path) -> None:
    done = call(capsys, "methods", "list", "--json")
    found = json.loads(done.out)
    assert done.code == 0
    assert [row["name"] for row in found] == list(methods.registered())
    assert all(list(row) == KEYS for row in found)
    by_name = {row["name"]: row for row in found}
    assert (by_name["grpo"]["kind"], by_name["sft"]["kind"]) == ("online", "offline")
    assert by_name["gptq"]["kind"] == "compression"
    assert by_name["gptq"]["parts"]["solver"].startswith("GPTQ(")
    assert by_name["grpo"]["card"] == "046"
    assert by_name["dpo"]["card"] is None
    assert by_name["dpo"]["summary"] == "Direct preference optimisation."
    assert by_name["grpo"]["parts"]["advantage"].startswith("GroupNormalised(")
    assert [by_name[name]["verdict"] for name in ("grpo", "dapo", "sft")] == ["holds", "fails", "none"]
    assert (by_name["kto"]["branch"], by_name["ppo"]["branch"]) == ("2.3u", "2.1")


def test_list_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "methods", "list", "--family", "preference")
    lines = done.out.splitlines()
    expected = [name for name, entry in methods.registered().items() if entry.family == "preference"]
    assert lines[0].split() == ["name", "family", "card", "verdict", "summary"]
    assert [line.split()[0] for line in lines[1:]] == expected
    assert any(line.rstrip().endswith("Direct preference optimisation.") for line in lines)


def test_verdicts_in_the_table(capsys: pytest.CaptureFixture[str], studied: Path) -> None:
    done = call(capsys, "methods", "list", "--family", "policy-gradient")
    (grpo,) = [line for line in done.out.splitlines() if line.startswith("grpo ")]
    assert grpo.split()[:4] == ["grpo", "policy-gradient", "046", "holds"]


@pytest.mark.parametrize("command", ["list", "show grpo"])
def test_verdicts_that_cannot_be_read(capsys: pytest.CaptureFixture[str], studied: Path, command: str) -> None:
    studied.write_text("[")
    done = call(capsys, "methods", *command.split())
    assert done.code == 1
    assert done.error.startswith(f"error: cannot read the studies' verdicts in {studied}: ")


def test_unknown_family(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "methods", "list", "--family", "prefrence")
    assert (done.code, done.out) == (1, "")
    assert done.error.startswith("error: unknown family 'prefrence'; did you mean preference")


def test_a_family_that_has_no_method_yet(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "methods", "list", "--family", "survey-theory", "--json").out == "[]\n"


@pytest.mark.parametrize("options", [("--json", "--tree"), ("--tree", "--gaps"), ("--gaps", "--json")])
def test_one_way_to_list_at_a_time(capsys: pytest.CaptureFixture[str], options: tuple[str, str]) -> None:
    done = call(capsys, "methods", "list", *options)
    assert (done.code, done.out) == (1, "")
    assert done.error == "error: --json, --tree and --gaps are three ways to list; give one of them"


# -- the taxonomy ----------------------------------------------------------------------------------------------------


def test_the_tree_holds_every_branch_and_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "methods", "list", "--tree")
    lines = done.out.splitlines()
    assert done.code == 0
    starts = [line.split()[0] for line in lines]
    for branch in taxonomy().branches:
        assert starts.count(branch) == 1
    for entry in methods.registered().values():
        assert entry.branch is not None
        # the nearest line before it that is less indented is its branch
        at = starts.index(entry.name)
        indent = len(lines[at]) - len(lines[at].lstrip())
        above = next(line for line in lines[at::-1] if len(line) - len(line.lstrip()) < indent)
        assert above.split()[0] == entry.branch
        assert lines[at].endswith(entry.summary)


def test_labels_of_the_tree(capsys: pytest.CaptureFixture[str]) -> None:
    lines = call(capsys, "methods", "list", "--tree").out.splitlines()
    assert "1 Fine-tuning" in lines
    assert "  1.1 Supervised fine-tuning (data, full-parameter, objective): 13 cards, " in "\n".join(lines)
    assert "    4.2a Additive adapters: no card, empty" in lines
    assert "  X10 Surveys and books: 4 cards, empty" in lines
    tag = "7 Applications (professional, technical, interaction): a tag (domain), no place; on cards 070, 086, 104, 107"
    assert tag in lines


def test_the_tree_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    done = call(capsys, "methods", "list", "--tree")
    assert "├── " in done.out
    assert "\x1b[" in done.out
    assert "no card, empty" in done.out


def test_a_family_of_the_tree(capsys: pytest.CaptureFixture[str]) -> None:
    lines = call(capsys, "methods", "list", "--tree", "--family", "preference").out.splitlines()
    assert lines[0] == "2 Alignment"
    assert [line.split()[0] for line in lines if line.lstrip()[0].isdigit()] == ["2", "2.3", "2.3u"]


def test_a_method_of_no_branch_stands_at_the_end() -> None:
    lost = Entry("mine", "of my own", None, methods.sft)
    *_, last = taxonomy_tree.nodes([lost])
    assert (last.branch.name, last.entries) == ("In no branch", (lost,))
    assert len(taxonomy_tree.nodes([])) == 8


def test_gaps_are_the_branches_without_a_method(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "methods", "list", "--gaps")
    heading, *lines = done.out.splitlines()
    assert heading.split() == ["empty", "name", "cards"]
    found = {line.split()[0]: line for line in lines}
    taken = {entry.branch for entry in methods.registered().values()}
    branches = taxonomy().branches
    assert list(found) == [b for b in branches if taxonomy().holds(branches[b]) and b not in taken]
    for name, line in found.items():  # card 026: exactly those that no card covers say so
        assert line.rstrip().endswith("no card") == (not branches[name].cards)
    assert found["X10"].split()[-4:] == ["026,", "031,", "055,", "060"]


def test_without_its_methods_a_branch_is_a_gap() -> None:
    entries = list(methods.registered().values())
    assert "1.1" not in {branch.id for branch in taxonomy_tree.gaps(entries)}
    left = [entry for entry in entries if entry.branch != "1.1"]
    assert "1.1" in {branch.id for branch in taxonomy_tree.gaps(left)}


# -- one method ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grpo", "GRPO"])
def test_show(capsys: pytest.CaptureFixture[str], name: str, studied: Path) -> None:
    studied.unlink()
    verdicts.verdicts.cache_clear()
    done = call(capsys, "methods", "show", name)
    lines = done.out.splitlines()
    assert done.code == 0
    assert lines[0] == "grpo(clip: float = 0.2, beta: float = 0.0)"
    assert lines[2].startswith("Group relative policy optimisation")
    assert "  denominator  OldPolicy()" in lines
    assert "  steps             100  (its own)" in lines
    assert "  warmup            0.05" in lines
    assert lines[-6:] == [
        "family: policy-gradient",
        "card: 046",
        "branch: 3.2a RL for reasoning, single turn",
        "kind: online",
        "learns from: prompts",
        "verdict: none (no study of it has been run)",
    ]


def test_show_a_compression(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "methods", "show", "rtn")
    lines = done.out.splitlines()
    assert done.code == 0
    assert lines[0].startswith("rtn(bits: int = 4, group: int = 128, zero: ")
    assert "  calibration  Calibrated(samples=64, length=512)" in lines
    assert "  transforms   none" in lines
    assert "branch: 4.1q Quantization (after training, aware, FP8)" in lines
    assert "kind: compression" in lines
    assert not [line for line in lines if line.startswith(("learns from", "settings"))]


def test_show_what_the_studies_found(capsys: pytest.CaptureFixture[str], studied: Path) -> None:
    lines = call(capsys, "methods", "show", "dapo").out.splitlines()
    assert "  sampler      Undecided" in lines
    at = lines.index("verdict: fails")
    assert lines[at + 1 : at + 9] == [
        "",
        "study filtering:",
        "  claim    It learns.",
        "  card     046",
        "  verdict  fails",
        "  figures  -1 point [-2, 0]",
        "  seeds    3",
        "  date     2026-01-02",
    ]
    assert lines[at + 10] == "study learning:"


@pytest.mark.parametrize("name", methods.registered())
def test_show_every_method(capsys: pytest.CaptureFixture[str], name: str) -> None:
    done = call(capsys, "methods", "show", name)
    assert done.code == 0
    assert done.out.startswith(f"{name}(")


def test_show_a_pipeline_and_a_mixture(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def recipe(clip: float = 0.1) -> methods.Pipeline:
        """Imitation, then both at once."""
        rl, imitation = methods.grpo(clip).objective, methods.sft().objective
        assert isinstance(rl, Objective)
        assert isinstance(imitation, Objective)
        both = Mixture((Term(rl, ("policy",)), Term(imitation, ("expert",), 0.5)))
        return methods.sft() >> methods.grpo(clip).replace(objective=both, critic=True)

    monkeypatch.setitem(registry._METHODS, "recipe", Entry("recipe", "hybrid", "046", recipe))
    lines = call(capsys, "methods", "show", "recipe").out.splitlines()
    assert lines[0] == "recipe(clip: float = 0.1)"
    titles = [line for line in lines if line.startswith("stage ")]
    assert titles == [
        "stage 1, sft: parts:",
        "stage 1, sft: settings:",
        "stage 2, grpo: parts on sequences from policy:",
        "stage 2, grpo: parts on sequences from expert:",
        "stage 2, grpo: beside them:",
        "stage 2, grpo: settings:",
    ]
    assert "  masks        Clip(low=0.1, high=0.1)" in lines
    assert "  weight       0.5" in lines
    assert lines[-4:-1] == [
        "branch: 1.3 Reinforcement fine-tuning (SFT and RL joined)",
        "kind: pipeline",
        "learns from: demonstrations, then prompts",
    ]
    (row,) = [r for r in json.loads(call(capsys, "methods", "list", "--json").out) if r["name"] == "recipe"]
    assert row["kind"] == "pipeline"
    assert [stage["method"] for stage in row["parts"]["stages"]] == ["sft", "grpo"]


def test_show_an_unknown_method(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "methods", "show", "gprpo")
    assert (done.code, done.error) == (1, "error: unknown method 'gprpo'; did you mean grpo?")


def test_models(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path))
    before = call(capsys, "models")
    assert before.code == 0
    assert before.out.startswith("smollm2-135m: SmolLM2-135M-Instruct")
    assert "not fetched yet: posttrain models pull smollm2-135m" in before.out
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "smollm2-135m" / "config.json").write_text("{}")
    assert f"cached in {tmp_path / 'smollm2-135m'}" in call(capsys, "models").out


def test_pull(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "bundled_folder", lambda name: tmp_path / name)
    done = call(capsys, "models", "pull", "smollm2-135m")
    assert (done.code, done.out) == (0, f"{tmp_path / 'smollm2-135m'}\n")


def test_pull_an_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "models", "pull", "smollm")
    assert done.code == 1
    assert done.error.startswith("error: unknown bundled model 'smollm'; did you mean smollm2-135m?")


RUN = {"name": "one", "status": "interrupted", "stages": [{"index": 0, "name": "sft"}], "notes": []}


def test_report_is_built_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    done = call(capsys, "report", tmp_path)
    page = tmp_path / "report.html"
    assert (done.code, done.out) == (0, f"{page}\n")
    assert "interrupted" in page.read_text()
    assert not opened
    assert call(capsys, "report", tmp_path, "--open").code == 0
    assert opened == [page.resolve().as_uri()]


def test_report_of_no_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    done = call(capsys, "report", tmp_path)
    assert done.code == 1
    assert done.error.startswith(f"error: {tmp_path} is not a run folder: no run.json in it")
    assert not list(tmp_path.iterdir())
    shutil.rmtree(tmp_path)
    assert call(capsys, "report", tmp_path).code == 1
