"""The page of a comparison of compressions: the sentence, the Pareto plot of perplexity and bits, all figures."""

from __future__ import annotations

import io
import math
from importlib import resources
from typing import TYPE_CHECKING, Any

from posttrain.report import document, theme
from posttrain.studies.comparison import p_in_words
from posttrain.studies.compressed_comparison import RULE, Compressed, CompressedComparison, factor
from posttrain.studies.pictures import STYLE
from posttrain.training.checkpoint import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing
    from plotly.graph_objects import Figure

BITS, PERPLEXITY = "stored bits a weight", "perplexity"
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x")
MARKERS = ("o", "s", "D", "^", "X")  # the same in a still picture


def write(found: CompressedComparison) -> None:
    """`comparison.json`, `compare.html`, and the picture of the Pareto front as `pareto.svg` and `pareto.png`."""
    write_text(found.folder / "comparison.json", found.to_json())
    document.write(found.page, render(found))
    write_text(found.folder / "pareto.svg", picture(found))
    (found.folder / "pareto.png").write_bytes(photograph(found))


def render(found: CompressedComparison) -> str:
    """The page as HTML."""
    data = {"axes": {}, "figures": {"result-0": _figure(found).to_plotly_json()}}
    template = resources.files("posttrain.studies").joinpath("compare_compressed.html").read_text(encoding="utf-8")
    return document.render(
        template,
        [document.file("curves.js")],
        {"curves_data": data},
        title=f"{', '.join(m.name for m in found.methods)} on {found.model}",
        sentence=found.sentence,
        remarks=found.remarks,
        rule=RULE,
        facts=_facts(found),
        headings=found.headings(),
        rows=found.rows(),
        differences=[
            (f"{d.other} over {d.method}", *factor(d), p_in_words(d.pvalue), d.real) for d in found.differences
        ],
    )


def _facts(found: CompressedComparison) -> list[tuple[str, str]]:
    facts = [
        ("model", found.model),
        ("calibrated on", f"{found.calibration}, {found.seeds} draw{'s' if found.seeds != 1 else ''}"),
        ("measured on", f"{found.windows} window{'s' if found.windows != 1 else ''} of {found.text}"),
    ]
    return facts if found.task is None else [*facts, ("task", found.task)]


def _front(found: CompressedComparison) -> list[Compressed]:
    """The methods of the Pareto front by rising bits."""
    return sorted((m for m in found.methods if m.front), key=lambda m: m.bits)


def _figure(found: CompressedComparison) -> Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    front = _front(found)
    figure.add_scatter(
        x=[m.bits for m in front], y=[m.perplexity.value for m in front], mode="lines", hoverinfo="skip",
        showlegend=False,
        line={"color": theme.NEUTRAL, "width": 1, "dash": "dot", "shape": "hv"},
    )  # fmt: skip
    for at, m in enumerate(found.methods):
        figure.add_scatter(
            x=[m.bits], y=[m.perplexity.value], mode="markers", name=theme.label(m.name),
            marker={"color": theme.stage_colour(at), "size": 9, "symbol": SYMBOLS[at % len(SYMBOLS)]},
            error_y=_bar(m, theme.stage_colour(at)),
            hovertemplate=f"%{{y:.4~g}} at %{{x:.3f}} bits<extra>{theme.label(m.name)}</extra>",
        )  # fmt: skip
    figure.add_hline(
        y=found.before.perplexity.value, line={"color": theme.NEUTRAL, "width": 1, "dash": "dash"},
        annotation={"text": f"float: {found.before.perplexity.value:.4g}", "font": {"color": theme.NEUTRAL}},
    )  # fmt: skip
    figure.update_layout(
        theme.layout(
            height=340,
            showlegend=True,
            legend={"font": {"color": theme.NEUTRAL}},
            xaxis=theme.axis(title={"text": BITS, "standoff": 6}, zeroline=False, nticks=8),
            yaxis=theme.axis(title={"text": PERPLEXITY, "standoff": 6}, type="log", nticks=6),
        )
    )
    return figure


def _bar(m: Compressed, colour: str) -> dict[str, Any]:
    high, low = m.perplexity.high - m.perplexity.value, m.perplexity.value - m.perplexity.low
    if not (math.isfinite(high) and math.isfinite(low)):
        return {"visible": False}
    return {"type": "data", "symmetric": False, "array": [high], "arrayminus": [low], "color": colour, "width": 4}


def picture(found: CompressedComparison) -> str:
    """The Pareto plot as SVG text, the same bytes for the same result."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    with rc_context(STYLE):
        target = io.StringIO()
        FigureCanvasSVG(_drawn(found)).print_svg(target, metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in target.getvalue().splitlines()) + "\n"


def photograph(found: CompressedComparison) -> bytes:
    """The Pareto plot as a PNG, on white."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with rc_context({**STYLE, "figure.facecolor": "white"}):
        target = io.BytesIO()
        FigureCanvasAgg(_drawn(found)).print_png(target)
    return target.getvalue()


def _drawn(found: CompressedComparison) -> Drawing:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(7.2, 4.0), dpi=160, layout="constrained")
    panel = figure.subplots()
    front = _front(found)
    steps = [m.perplexity.value for m in front]
    panel.step([m.bits for m in front], steps, where="post", color=theme.NEUTRAL, linewidth=1, linestyle=":")
    for at, m in enumerate(found.methods):
        value, colour = m.perplexity.value, theme.stage_colour(at)
        ends = [[value - m.perplexity.low], [m.perplexity.high - value]]
        finite = all(math.isfinite(end) for (end,) in ends)
        panel.errorbar(
            m.bits, value, yerr=ends if finite else None, fmt=MARKERS[at % len(MARKERS)], color=colour, capsize=3,
            markersize=6, label=m.name,
        )  # fmt: skip
    panel.axhline(found.before.perplexity.value, color=theme.NEUTRAL, linewidth=1, linestyle="--")
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.margins(x=0.06, y=0.08)
    panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, labelcolor=theme.NEUTRAL)
    panel.grid(color=theme.NEUTRAL, alpha=0.22, linewidth=0.6)
    panel.set_xlabel(BITS)
    panel.set_ylabel(PERPLEXITY)
    panel.set_title(f"{found.model} compressed; dashed: the float model, dotted: the Pareto front", loc="left")
    return figure
