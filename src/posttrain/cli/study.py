"""`posttrain study`: run the studies, or those of their arms that have not been run yet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from posttrain.studies.registry import Entry
    from posttrain.studies.results import Result
    from posttrain.studies.runner import Plan


def study(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Studies.", show_default=False)] = None,
    family: Annotated[str | None, typer.Option(help="All studies of a family of methods.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All studies.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="List the studies and their last verdicts.")] = False,
    seeds: Annotated[int | None, typer.Option(help="In place of each study's own number, at least 3.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The smallest run, to see that it runs; nothing is written to docs/studies.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run again what has been run before.")] = False,
    jobs: Annotated[int | None, typer.Option(help="Arms that run at a time (default: one a processor core).")] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where results go (default: docs/studies of a checkout, else ./studies)."),
    ] = None,
) -> None:
    """Test what papers claim of their methods.

    Each method is run beside its baseline, several seeds each, and judged by a rule that was fixed before. Results of
    arms are kept and shared between studies: stopped at any time and started again, it runs what is missing.
    """
    from posttrain.trajectory import PosttrainError

    entries = _chosen(names or [], family, everything, list_)
    if list_:
        _print_list(entries)
        return
    for name, value, least in (("--seeds", seeds, 1 if quick else 3), ("--jobs", jobs, 1)):
        if value is not None and value < least:
            raise PosttrainError(f"{name} {value}: expected at least {least}")
    failed = _run(entries, seeds, quick, fresh, jobs or _cores(), output)
    if failed:
        count = f"{len(failed)} failures" if len(failed) > 1 else "failed"
        raise PosttrainError(
            f"{count}: {failed[0]}{', ...' * (len(failed) > 1)}; what is done is kept: mend this and run the same "
            f"command again"
        )


def _chosen(names: list[str], family: str | None, everything: bool, listing: bool) -> list[Entry]:
    from posttrain.studies import registry
    from posttrain.trajectory import PosttrainError

    if bool(names) + (family is not None) + everything > 1:
        raise PosttrainError("names of studies, --family and --all are three ways to choose; give one of them")
    if family is not None:
        return registry.of_family(family)
    if everything or (listing and not names):
        return list(registry.registered().values())
    if not names:
        raise PosttrainError("no study given: expected names, --family F or --all (posttrain study --list shows them)")
    return list({entry.name: entry for entry in map(registry.find, names)}.values())


def _run(
    entries: list[Entry], seeds: int | None, quick: bool, fresh: bool, jobs: int, output: Path | None
) -> list[str]:
    """Run what is missing, and report every study as soon as it is complete; returns what failed."""
    from contextlib import closing

    from posttrain.studies import runner
    from posttrain.studies.display import Display
    from posttrain.studies.pages import docs_folder

    failed: list[str] = []
    folder = output or (None if quick else docs_folder() or Path("studies"))
    plans = _plans(entries, seeds, quick, failed)
    if fresh:
        runner.forget(plans)
    missing = runner.missing(plans)
    if quick:
        missing = runner.models_first(missing, plans)
    waiting = [plan for plan in plans if not _report(plan, folder, failed)]
    with Display(len(missing)) as display, closing(runner.run(missing, jobs, display.started)) as finished:
        for job, error in finished:
            display.finished(job, error)
            if error is not None:
                failed.append(str(job))
                continue
            with display.aside():
                waiting = [p for p in waiting if job.key not in p.keys or not _report(p, folder, failed)]
        if quick:
            display.summary()
    return failed


def _plans(entries: list[Entry], seeds: int | None, quick: bool, failed: list[str]) -> list[Plan]:
    """The studies' plans; one that cannot be built takes no other along."""
    from posttrain.studies import runner

    plans = []
    for entry in entries:
        try:
            plans.append(runner.plan(entry, seeds, quick))
        except Exception as error:
            _say(f"{entry.name}: failed: {type(error).__name__}: {error}")
            failed.append(entry.name)
    return plans


def _report(plan: Plan, folder: Path | None, failed: list[str]) -> bool:
    """Judge a study, print the verdict and write it down; False while jobs of it are missing."""
    from posttrain.studies.pages import write
    from posttrain.studies.results import result_of
    from posttrain.trajectory import PosttrainError

    records = plan.records()
    if records is None:
        return False
    try:
        result = result_of(plan, records)
    except PosttrainError as error:  # an expectation of what was not measured
        _say(f"{plan.entry.name}: failed: {error}")
        failed.append(plan.entry.name)
        return True
    _print(result)
    if folder is not None:
        print(f"written to {write(result, folder)}")
    return True


def _say(text: str) -> None:
    import sys

    from posttrain.terminal import one_line

    print(one_line(text), file=sys.stderr, flush=True)


def _print(result: Result) -> None:
    from posttrain.cli.table import print_table
    from posttrain.studies.results import interval, number

    print(f"\n{result.study}: {result.claim}")
    rows = [
        (f.expectation, interval(f.effect, f.low, f.high, signed=True), number(f.pvalue), f.verdict)
        for f in result.expectations
    ]
    print_table(("expected", "effect with 95 % interval", "p", "verdict"), rows)
    speed = "" if result.rollouts_per_second is None else f", {number(result.rollouts_per_second)} rollouts a second"
    print(f"{result.seeds} seed{'s' * (result.seeds > 1)}, {number(result.seconds)} s of training{speed}")
    print(f"verdict: {result.verdict}" + (" (a quick run, which proves nothing)" if result.quick else ""))


def _print_list(entries: list[Entry]) -> None:
    from posttrain.cli.table import print_table
    from posttrain.methods.verdicts import verdicts

    found = {verdict.study: verdict.verdict for verdict in verdicts()}
    print_table(
        ("study", "family", "methods", "card", "verdict", "summary"),
        [
            (e.name, e.family, ", ".join(e.methods), ", ".join(e.cards), found.get(e.name, "none"), e.summary)
            for e in entries
        ],
    )


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
