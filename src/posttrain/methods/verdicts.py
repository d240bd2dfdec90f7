"""What the studies found: the verdicts that the package ships, read without importing a study.

`studies/verdicts.json` is written with the studies' results. A study says whether a paper's claim about its methods
holds here; what nobody has studied has the verdict `none`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal, get_args

from posttrain.trajectory import PosttrainError

Outcome = Literal["holds", "fails", "unclear", "none"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A study's outcome. effect: what was measured, a sentence with its interval; date: of the run."""

    study: str
    methods: tuple[str, ...]
    claim: str
    verdict: Outcome
    effect: str = ""
    cards: tuple[str, ...] = ()
    seeds: int | None = None
    date: str = ""


@functools.cache
def verdicts() -> tuple[Verdict, ...]:
    """All of them, in order of the studies' names; empty before any study was run."""
    file = files("posttrain") / "studies" / "verdicts.json"
    return parse(file.read_text(encoding="utf-8"), str(file)) if file.is_file() else ()


def parse(text: str, origin: str) -> tuple[Verdict, ...]:
    """Verdicts from the text of the file: a mapping of study to its outcome; `origin` is named in errors."""
    try:
        read = json.loads(text)
    except json.JSONDecodeError as error:
        raise _unreadable(origin, str(error)) from None
    if not isinstance(read, Mapping):
        raise _unreadable(origin, f"it holds a {type(read).__name__}, expected a mapping of study to outcome")
    return tuple(_verdict(study, read[study], origin) for study in sorted(read))


def of_method(name: str) -> tuple[Verdict, ...]:
    """The verdicts of the studies that test a method."""
    return tuple(v for v in verdicts() if name in v.methods)


def overall(found: Iterable[Verdict]) -> Outcome:
    """One word for several studies, as a study joins its expectations: `fails` if any fails, `holds` if all hold."""
    outcomes = {v.verdict for v in found}
    if "fails" in outcomes:
        return "fails"
    if not outcomes or outcomes == {"none"}:
        return "none"
    return "holds" if outcomes == {"holds"} else "unclear"


def _verdict(study: str, given: Any, origin: str) -> Verdict:
    if not isinstance(given, Mapping):
        raise _unreadable(origin, f"{study} is {given!r}, expected a mapping with methods, claim and verdict")
    methods, card = given.get("methods"), given.get("card")
    if not isinstance(methods, list) or not all(isinstance(name, str) for name in methods):
        raise _unreadable(origin, f"methods of {study} is {methods!r}, expected a list of names")
    if given.get("verdict") not in get_args(Outcome):
        raise _unreadable(
            origin, f"verdict of {study} is {given.get('verdict')!r}, expected {', '.join(get_args(Outcome))}"
        )
    return Verdict(
        study,
        tuple(methods),
        given.get("claim", ""),
        given["verdict"],
        given.get("effect", ""),
        tuple(card) if isinstance(card, list) else (card,) if card else (),
        given.get("seeds"),
        given.get("date", ""),
    )


def _unreadable(origin: str, why: str) -> PosttrainError:
    return PosttrainError(f"cannot read the studies' verdicts in {origin}: {why}; write them again: make studies")
