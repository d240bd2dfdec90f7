"""The part of `posttrain compare` that compares compressions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.cli.task_option import task_option

if TYPE_CHECKING:
    from posttrain.cli.train import Given
    from posttrain.compress.method import Compression
    from posttrain.methods.registry import Entry

WINDOWS, LENGTH = 64, 512  # of calibration text, the same for all methods


def compare_compressed(
    entries: list[Entry],
    *,
    model: str,
    task: str | None,
    bits: str | None,
    group: int | None,
    overrides: list[str],
    calibration: str | None,
    text: str | None,
    windows: int | None,
    length: int | None,
    skip: tuple[str, ...],
    seeds: int,
    folder: Path | None,
    holdout: int | None,
) -> None:
    """Compress a model by each method at each number of bits, and print what came out."""
    from posttrain.cli.compression import fitting, given_text
    from posttrain.cli.train import given_settings
    from posttrain.models.load import load
    from posttrain.studies.compare_compressed import compare_compressed as compare
    from posttrain.studies.compression import texts_for

    given = given_settings({"group": group}, overrides)
    much = (WINDOWS if windows is None else windows, LENGTH if length is None else length)
    counts = _bits(bits)
    _methods(entries, given, counts, much)  # what is wrong with it is told before a model is loaded
    problems = task_option(task, model)
    source = None if calibration is None else given_text("--calibration", calibration)
    unseen = None if text is None else given_text("--text", text)
    policy = load(model)
    made = _methods(entries, given, counts, much, lambda method: fitting(method, given, policy, skip))
    found = compare(
        policy, made, texts_for(policy, source, unseen), task=problems, seeds=seeds, folder=folder, holdout=holdout,
        skip=skip,
    )  # fmt: skip
    print(found)
    print(f"page: {found.page}")


def _bits(text: str | None) -> list[int | None]:
    from posttrain.trajectory import PosttrainError

    if text is None:
        return [None]
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise PosttrainError(f"--bits {text}: expected whole numbers, as in 2,3,4") from None


def _methods(
    entries: list[Entry],
    given: Given,
    bits: list[int | None],
    much: tuple[int, int],
    fit: Callable[[Compression], Compression] = lambda method: method,
) -> dict[str, Compression]:
    """The methods by the names to show, each with the arguments that it knows, all calibrated on as much text."""
    from posttrain.cli.compression import calibrated, made
    from posttrain.reward.names import unknown
    from posttrain.trajectory import PosttrainError

    known = set().union(*(entry.parameters for entry in entries))
    for key in given:
        if key not in known:
            raise unknown("argument of these methods", key, known)
    found: dict[str, Compression] = {}
    for count in bits:
        for entry in entries:
            own = dict(given)
            if count is not None:
                if "bits" not in entry.parameters:
                    raise PosttrainError(f"--bits {count}: {entry.name} takes no bits; leave --bits out, or the method")
                own["bits"] = (count, f"--bits {count}")
            name = entry.name if len(bits) == 1 else f"{entry.name} {count} bits"
            found[name] = calibrated(fit(made(entry, own, shared=True)), *much, option="windows")
    return found
