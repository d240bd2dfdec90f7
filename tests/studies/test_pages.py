"""What is written of a study: JSON, page, picture, index, and the verdicts that the package ships."""

from __future__ import annotations

import json
import math
import re
import threading
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
import toy_studies  # noqa: F401 - registers them

from posttrain.methods.verdicts import parse
from posttrain.studies import pages, registry, runner
from posttrain.studies.pictures import draw, together
from posttrain.studies.results import Result, interval, number, result_of
from posttrain.trajectory import PosttrainError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path / "home"))


def result(name: str, seeds: int | None = None, quick: bool = False) -> Result:
    plan = runner.plan(registry.known(name), seeds, quick)
    for job in runner.missing([plan]):
        assert runner.carry_out(job) is None
    records = plan.records()
    assert records is not None
    return result_of(plan, records)


def test_what_a_study_came_to() -> None:
    found = result("toy-climb")
    assert (found.verdict, found.seeds, found.methods, found.card) == ("holds", 3, ("grpo",), ("046",))
    assert found.family == "policy-gradient"
    assert found.paper == "On slopes, 1999, arXiv 9901.00001"
    steep = found.arms["steep"]
    assert steep.figures["height"].values == [4.0, 4.01, 4.02]
    assert steep.figures["height"].mean == pytest.approx(4.01)
    assert (steep.rollouts, steep.tokens, steep.seconds) == (96, 120, 6.0)
    assert (found.seconds, found.rollouts_per_second) == (12.0, 16.0)
    assert found.effect == "height: steep higher than flat by more than 0.5: +4 [4, 4] (holds)"
    other = result("toy-same")
    assert other.verdict == "fails"
    assert other.paper.startswith("DeepSeekMath, 2024"), "of the first method that is registered"


def test_the_json_holds_all_of_it() -> None:
    row = json.loads(result("toy-climb", seeds=1).to_json())
    assert row["arms"]["flat"]["figures"]["height"] == {"values": [0.0], "mean": 0.0, "low": None, "high": None}
    assert row["expectations"][0]["verdict"] == row["verdict"] == "unclear"
    assert row["expectations"][0]["pvalue"] is None
    assert {"study", "methods", "card", "claim", "setting", "seeds", "quick", "rollouts_per_second", "seconds",
            "versions", "date", "machine", "effect"} <= row.keys()  # fmt: skip


def test_the_page(tmp_path: Path) -> None:
    page = pages.write(result("toy-climb"), tmp_path / "out").read_text()
    for text in (
        "# toy-climb\n",
        "**Claim.** A steeper slope leads higher.",
        "**Verdict: holds.**",
        "| height: steep higher than flat by more than 0.5 | +4 [4, 4] | 0 | holds | that is a slope |",
        "![The figures of every arm, seed by seed](toy-climb.svg)",
        "Walking four steps up a line.",
        "| steep | 4.01 [3.99, 4.03] (4, 4.01, 4.02) |",
        "16 rollouts a second",
        "The study holds if all expectations hold",
        "## Notes\n\nNothing was tuned.",
        "posttrain study toy-climb --fresh",
    ):
        assert text in page
    assert "quick" not in page


def test_a_bar_in_a_name_stays_in_its_cell() -> None:
    page = pages.page(replace(result("toy-climb"), claim="a|b"))
    assert "a|b" in page
    assert r"| a\|b |" in pages.index([{**json.loads(result("toy-climb").to_json()), "claim": "a|b"}])


def test_the_index_has_every_study_once(tmp_path: Path) -> None:
    for name in ("toy-same", "toy-climb", "toy-climb"):
        pages.write(result(name), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "2 studies: 1 holds, 1 fails, 0 unclear." in text
    rows = [line for line in text.splitlines() if line.startswith("| [")]
    assert rows == [
        "| [toy-climb](toy-climb.md) | On slopes, 1999, arXiv 9901.00001 | A steeper slope leads higher. | "
        "Walking four steps up a line. 3 seeds. | height: steep higher than flat by more than 0.5: +4 [4, 4] (holds) | "
        "holds |",
        "| [toy-same](toy-same.md) | DeepSeekMath, 2024, arXiv 2402.03300 (row GRPO of card 046) | A slope leads up. | "
        "As before. 3 seeds. | height: up at least 10: +4.01 [3.99, 4.03] (fails) | fails |",
    ]


def test_studies_that_end_side_by_side_are_all_in_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first to read the results would be the last to write the index, if the other did not wait for it."""
    both = [result("toy-climb"), result("toy-same")]
    real, written = pages.index, threading.Event()

    def index(rows: list) -> str:
        if len(rows) == 1:
            written.wait(0.4)
        return real(rows)

    def write(each: Result) -> None:
        pages.write(each, tmp_path)
        written.set()

    monkeypatch.setattr(pages, "index", index)
    monkeypatch.setattr(pages, "draw", lambda each: "<svg/>")
    threads = [threading.Thread(target=write, args=(each,)) for each in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "2 studies:" in (tmp_path / "README.md").read_text()


def test_quick_results_stay_out_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "docs_folder", lambda: tmp_path / "docs")
    monkeypatch.setattr(pages, "VERDICTS", tmp_path / "verdicts.json")
    quick = result("toy-climb", quick=True)
    assert "a quick run, which proves nothing" in pages.write(quick, tmp_path / "other").read_text()
    with pytest.raises(PosttrainError, match="a --quick run proves nothing and is not written"):
        pages.write(quick, tmp_path / "docs")
    assert not (tmp_path / "docs").exists()
    assert not (tmp_path / "verdicts.json").exists()


def test_the_verdicts_follow_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "docs_folder", lambda: tmp_path / "docs")
    monkeypatch.setattr(pages, "VERDICTS", tmp_path / "verdicts.json")
    for name in ("toy-climb", "toy-same"):
        pages.write(result(name), tmp_path / "docs")
    climb, same = parse((tmp_path / "verdicts.json").read_text(), "here")
    assert (climb.study, climb.verdict, climb.seeds, climb.cards) == ("toy-climb", "holds", 3, ("046",))
    assert climb.effect == "height: steep higher than flat by more than 0.5: +4 [4, 4] (holds)"
    assert (same.methods, same.cards, same.verdict) == (("nothing", "grpo"), ("046", "030"), "fails")


def test_the_shipped_verdicts_are_those_of_the_docs() -> None:
    folder = pages.docs_folder()
    assert folder is not None, "the tests run from a checkout"
    assert (folder.parent / "design.md").is_file()
    assert json.loads(pages.VERDICTS.read_text()) == pages.verdicts(pages.read(folder)), "run make studies"


def test_a_file_that_is_no_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(PosttrainError, match=r"other\.json is no study's result"):
        pages.write(result("toy-climb"), tmp_path)


def test_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    found = result("toy-climb")
    picture = draw(found)
    assert len(picture) < 100_000
    assert ET.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"
    for text in ("height: mean with 95 % interval, and every seed", "flat", "steep", "step", "height: mean over seeds"):
        assert text in picture
    assert draw(found) == picture, "the same bytes"
    assert not re.search(r"#(?:000000|ffffff)|(?:fill|stroke): (?:black|white)|<dc:date>", picture), (
        "nothing that vanishes on a dark or a light page"
    )
    assert "height: mean over seeds" not in draw(replace(found, curves={arm: {} for arm in found.arms}))


def test_a_long_curve_is_thinned() -> None:
    line = [{"step": i, "value": 2.0 * i} for i in range(5000)]
    found = replace(result("toy-climb"), curves={arm: {"c": [line] * 5} for arm in ("flat", "steep")})
    assert len(draw(found)) < 100_000


def test_curves_of_seeds_that_stopped_at_different_steps() -> None:
    first = [{"step": s, "value": float(s)} for s in (0, 2, 4, 6)]
    second = [{"step": s, "value": 10.0 + s} for s in (0, 3, 5)]
    steps, values = together([first, second])
    assert steps.tolist() == [0, 2, 3, 4, 5]
    assert values.tolist() == [[0, 2, 3, 4, 5], [10, 12, 13, 14, 15]]


def test_numbers_in_words() -> None:
    assert [number(v) for v in (0.41666, 1234.5, 0, 1e-5, math.nan)] == ["0.417", "1,234", "0", "1e-05", "none"]
    assert interval(0.5, 0.25, 0.75, signed=True) == "+0.5 [0.25, 0.75]"
    assert interval(0.5, math.nan, math.nan) == "0.5"
