from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain import methods
from posttrain.methods import verdicts as module
from posttrain.methods.verdicts import Outcome, Verdict, of_method, overall, parse, verdicts
from posttrain.trajectory import PosttrainError

STUDY = {
    "methods": ["grpo", "dapo"], "card": "046", "claim": "Filtering helps.", "verdict": "holds",
    "effect": "+4.1 points [1.0, 7.2]", "seeds": 3, "date": "2026-01-02",
}  # fmt: skip


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in the place of the installed package; returns where the verdicts would be in it."""
    monkeypatch.setattr(module, "files", lambda name: tmp_path)
    (tmp_path / "studies").mkdir()
    verdicts.cache_clear()
    yield tmp_path / "studies" / "verdicts.json"
    verdicts.cache_clear()


def test_a_study() -> None:
    (found,) = parse(json.dumps({"filtering": STUDY}), "here")
    assert found == Verdict(
        study="filtering",
        methods=("grpo", "dapo"),
        claim="Filtering helps.",
        verdict="holds",
        effect="+4.1 points [1.0, 7.2]",
        cards=("046",),
        seeds=3,
        date="2026-01-02",
    )


def test_what_may_be_missing() -> None:
    bare = {"methods": [], "verdict": "unclear"}
    many = {"methods": ["sft"], "verdict": "fails", "card": ["044", "051"]}
    found = parse(json.dumps({"b": many, "a": bare}), "here")
    assert [v.study for v in found] == ["a", "b"]
    assert found[0] == Verdict("a", (), "", "unclear")
    assert found[1].cards == ("044", "051")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot read the studies' verdicts in here: Expecting property name"),
        ("[]", "it holds a list, expected a mapping of study to outcome"),
        ('{"a": 1}', "a is 1, expected a mapping with methods, claim and verdict"),
        ('{"a": {"verdict": "holds"}}', "methods of a is None, expected a list of names"),
        ('{"a": {"methods": "sft", "verdict": "holds"}}', "methods of a is 'sft', expected a list of names"),
        ('{"a": {"methods": []}}', "verdict of a is None, expected holds, fails, unclear, none"),
        ('{"a": {"methods": [], "verdict": "yes"}}', "verdict of a is 'yes', expected holds, fails, unclear, none"),
    ],
)
def test_a_file_that_cannot_be_read(text: str, said: str) -> None:
    with pytest.raises(PosttrainError) as error:
        parse(text, "here")
    assert said in str(error.value)
    assert str(error.value).endswith("; write them again: make studies")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        ([], "none"),
        (["none"], "none"),
        (["holds"], "holds"),
        (["holds", "holds"], "holds"),
        (["holds", "none"], "unclear"),
        (["holds", "unclear"], "unclear"),
        (["holds", "unclear", "fails"], "fails"),
    ],
)
def test_several_studies_in_one_word(outcomes: list[Outcome], said: str) -> None:
    assert overall([Verdict("s", (), "", outcome) for outcome in outcomes]) == said


def test_before_any_study(package: Path) -> None:
    assert verdicts() == ()
    assert methods.find("grpo").verdict == "none"
    assert methods.find("grpo").studies == ()


def test_of_the_file_that_is_shipped(package: Path) -> None:
    package.write_text(json.dumps({"filtering": STUDY, "other": {**STUDY, "methods": ["dapo"], "verdict": "unclear"}}))
    assert [v.study for v in of_method("dapo")] == ["filtering", "other"]
    assert [methods.find(name).verdict for name in ("grpo", "dapo", "sft")] == ["holds", "unclear", "none"]


def test_an_error_names_the_file(package: Path) -> None:
    package.write_text("no JSON")
    with pytest.raises(PosttrainError, match=str(package)):
        verdicts()
