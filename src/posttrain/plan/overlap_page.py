"""The page of a simulation: throughput against workers, a figure for each spread, and the figures in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.plan.overlap import Completions, Curve, Service
from posttrain.report import document, theme

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

HEADINGS = ("staleness", "spread", "saturates at", "completions/s", "of the training bound", "trainer at work",
            "workers at work", "updates behind")  # fmt: skip


def rows(curves: Sequence[Curve], gpus_each: int = 1, trainer_gpus: int = 0) -> list[tuple[str, ...]]:
    """The table, a row a curve, at the number of workers where it saturates."""
    found: list[tuple[str, ...]] = []
    for curve in curves:
        at = next(p for p in curve.points if p.workers == curve.saturates)
        gpus = f" ({curve.saturates * gpus_each + trainer_gpus:,} GPUs)" if trainer_gpus else ""
        found.append(
            (
                str(curve.staleness), f"{curve.spread:.2g}", f"{curve.saturates:,} workers{gpus}",
                f"{at.outcome.throughput:,.3g}", f"{curve.share:.0%}", f"{at.outcome.trainer:.0%}",
                f"{at.outcome.rollout:.0%}", f"{at.outcome.staleness:.2f}, at most {at.outcome.stalest}",
            )
        )  # fmt: skip
    return found


def sentence(curves: Sequence[Curve], times: Service) -> str:
    """What comes out, in plain words: the best curve, and what limits it."""
    best = max(curves, key=lambda c: max(p.outcome.throughput for p in c.points))
    at = next(p for p in best.points if p.workers == best.saturates)
    largest = best.points[-1]
    limit = (
        "the trainer is the limit" if best.share >= 0.9
        else "more workers would go on adding" if best.saturates == largest.workers and len(best.points) > 1
        else "the longest completion of a step is the limit: raise the staleness bound, or cut completions off earlier"
    )  # fmt: skip
    return (
        f"Staleness {best.staleness} at spread {best.spread:.2g} does best: {best.saturates:,} workers of "
        f"{times.slots} slots train {at.outcome.throughput:,.3g} completions a second, {best.share:.0%} of what "
        f"the trainer could take; {limit}."
    )


def write(
    page: Path, curves: Sequence[Curve], times: Service, completions: Completions, steps: int, gpus_each: int = 1,
    trainer_gpus: int = 0,
) -> Path:  # fmt: skip
    """Write the page and return its path."""
    page.parent.mkdir(parents=True, exist_ok=True)
    document.write(page, render(curves, times, completions, steps, gpus_each, trainer_gpus))
    return page


def render(
    curves: Sequence[Curve], times: Service, completions: Completions, steps: int, gpus_each: int = 1,
    trainer_gpus: int = 0,
) -> str:  # fmt: skip
    """The page as HTML."""
    spreads = sorted({c.spread for c in curves})
    bounds = sorted({c.staleness for c in curves})
    figures = {
        f"result-{at}": _figure([c for c in curves if c.spread == spread], bounds, times)
        for at, spread in enumerate(spreads)
    }
    data = {"axes": {}, "figures": {name: figure.to_plotly_json() for name, figure in figures.items()}}
    template = resources.files("posttrain.plan").joinpath("overlap.html").read_text(encoding="utf-8")
    return document.render(
        template,
        [document.file("curves.js")],
        {"curves_data": data},
        sentence=sentence(curves, times),
        facts=_facts(times, completions, steps),
        headings=HEADINGS,
        rows=rows(curves, gpus_each, trainer_gpus),
        panels=[(name, f"Spread of the lengths {spread:.2g}") for name, spread in zip(figures, spreads, strict=True)],
        bounds=[(bound, theme.stage_colour(at)) for at, bound in enumerate(bounds)],
    )


def _facts(times: Service, completions: Completions, steps: int) -> list[tuple[str, str]]:
    lengths = (
        f"{len(completions.measured):,} measured" if completions.measured
        else f"{completions.mean:,.0f} tokens on average"
        + (f", at most {completions.longest:,.0f}" if completions.longest else "")
    )  # fmt: skip
    return [
        ("update", f"{times.update:.3g} s, {times.completions:,} completions"),
        ("a token", f"{1000 * times.token:.3g} ms in each of {times.slots} slots of a worker"),
        ("prefill", f"{times.prefill:.3g} s"),
        ("weights to the workers", f"{times.sync:.3g} s"),
        ("lengths", lengths),
        ("simulated", f"{steps} steps, the first quarter left out"),
    ]


def _figure(curves: Sequence[Curve], bounds: Sequence[int], times: Service) -> Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    for curve in curves:
        colour = theme.stage_colour(bounds.index(curve.staleness))
        workers = [p.workers for p in curve.points]
        figure.add_scatter(
            x=workers, y=[p.outcome.throughput for p in curve.points], mode="lines+markers",
            name=f"staleness {curve.staleness}", line={"color": colour, "width": 2},
            marker={"color": colour, "size": [10 if n == curve.saturates else 5 for n in workers]},
            hovertemplate=f"%{{y:.4~g}} completions/s, %{{x}} workers<extra>staleness {curve.staleness}</extra>",
        )  # fmt: skip
    if times.training_bound < float("inf"):
        figure.add_hline(
            y=times.training_bound, line={"color": theme.NEUTRAL, "width": 1, "dash": "dash"},
            annotation={"text": "the trainer never waits", "font": {"color": theme.NEUTRAL}},
        )  # fmt: skip
    figure.update_layout(
        theme.layout(
            height=300,
            xaxis=theme.axis(title={"text": "rollout workers", "standoff": 6}, type="log", zeroline=False, nticks=8),
            yaxis=theme.axis(title={"text": "completions a second", "standoff": 6}, rangemode="tozero", nticks=6),
        )
    )
    return figure
