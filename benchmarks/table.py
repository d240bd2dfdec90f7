"""The figures as tables on the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.measurement import Arm, Measurement
from benchmarks.roofline import Size
from benchmarks.summary import CaseResult, distance, figures, peak_mib, roofline_seconds, undecided


def show(results: Sequence[CaseResult], throughput: float, console: Console) -> None:
    """Print the comparison, the roofline, and every way TRL was run."""
    console.print(_comparison(results))
    console.print(_roofline(results, throughput))
    console.print(_arms(results))
    for result in results:
        console.print(_about(result), highlight=False)


def _comparison(results: Sequence[CaseResult]) -> Table:
    title = r"posttrain and TRL: median over repetitions \[least, most]"
    table = _table(
        title, "case", "TRL by", "rate", "ours", "TRL", "ratio", "wanted", "MiB ours", "MiB TRL", "wanted", left=3
    )
    for result in results:
        ours = peak_mib(result.ours)
        for arm in result.compared:
            trl = peak_mib(result.repeated[arm])
            for i, figure in enumerate(figures(result, arm)):
                within = _verdict("≤ TRL", ours <= trl) if figure.target else ""
                memory = (f"{ours:,.0f}", f"{trl:,.0f}", within) if i == 0 else ("", "", "")
                wanted = _verdict(f"≥ {figure.target:g}", figure.met) if figure.target else ""
                rates = (_spread(figure.ours), _spread(figure.trl), _spread(figure.ratios))
                table.add_row(figure.case, str(arm), figure.unit, *rates, wanted, *memory)
    return table


def _roofline(results: Sequence[CaseResult], throughput: float) -> Table:
    title = f"Roofline: work a step needs over {throughput / 1e12:.2f} TFLOP/s of matrix products"
    columns = ("case", "TFLOP a step", "roofline s", "ours s", "TRL s", "ours × roofline", "TRL × roofline")
    table = _table(title, *columns)
    for result in results:
        size = Size(**result.ours[0].about["size"])
        trl = result.repeated[result.compared[0]]
        seconds = roofline_seconds(result.case, result.ours[0], size, throughput)
        table.add_row(
            result.case.name,
            f"{seconds * throughput / 1e12:.2f}",
            f"{seconds:.2f}",
            _spread([m.mean_seconds for m in result.ours]),
            _spread([m.mean_seconds for m in trl]),
            *(f"{distance(result.case, side, size, throughput):.1f}" for side in (result.ours, trl)),
        )
    return table


def _arms(results: Sequence[CaseResult]) -> Table:
    table = _table("TRL by arm (* compared with)", "case", "arm", "s a step", "peak MiB", "repetitions", left=2)
    for result in results:
        arms: dict[Arm, list[Measurement]] = {a: [m] for a, m in result.screened.items()} | result.repeated
        for arm, found in arms.items():
            mark = " *" if arm in result.compared else ""
            times = len(found) if arm in result.repeated else 0
            spread = _spread([m.mean_seconds for m in found])
            table.add_row(result.case.name, f"{arm}{mark}", spread, f"{peak_mib(found):,.0f}", str(times or "screened"))
    return table


def _about(result: CaseResult) -> str:
    ours, trl = result.ours[0], result.repeated[result.compared[0]][0]
    if not result.case.online:
        return (
            f"{result.case.name}: both took the same {ours.completions} sequences of "
            f"{ours.tokens / ours.completions:.0f} tokens on average; first loss {ours.first_loss:.4f} ours, "
            f"{trl.first_loss:.4f} TRL"
        )
    lengths, none = ([f(m) for m in (ours, trl)] for f in (lambda m: m.completion_tokens / m.completions, undecided))
    return (
        f"{result.case.name}: {ours.completions} completions of {lengths[0]:.1f} tokens on average ours, "
        f"{trl.completions} of {lengths[1]:.1f} TRL; groups without a gradient {none[0]:.0%} ours, {none[1]:.0%} TRL"
    )


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", no_wrap=True)
    return table


def _spread(values: Sequence[float]) -> str:
    digits = 2 if statistics.median(values) < 20 else 0
    middle, low, high = (f"{f(values):,.{digits}f}" for f in (statistics.median, min, max))
    return middle if len(values) == 1 else rf"{middle} \[{low}, {high}]"


def _verdict(wanted: str, met: bool) -> str:
    return f"[green]{wanted} met[/green]" if met else f"[red]{wanted} missed[/red]"
