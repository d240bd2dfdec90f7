"""The training curves: one small figure a metric, its stages told apart by colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from posttrain.report import theme
from posttrain.report.folder import Row, Stage, number, stage_of
from posttrain.report.thin import keep_peaks

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

POINTS = 2000  # of one stage in one figure; beyond them only peaks are drawn
TITLES = {
    "reward": "Reward",
    "loss": "Loss",
    "heldout_loss": "Held-out loss",
    "entropy": "Entropy",
    "kl": "KL divergence",
    "length": "Completion length",
    "clip_fraction": "Clip fraction",
    "accuracy": "Accuracy",
    "heldout_accuracy": "Held-out accuracy",
    "tokens_per_second": "Tokens per second",
    "completions_per_second": "Completions per second",
}
SHARES = ("clip_fraction", "accuracy", "heldout_accuracy")
NOT_CURVES = ("stage", "step", "time")


@dataclass(frozen=True, slots=True)
class Panel:
    """A figure and its caption. `figure` is None where the metric never had a finite value."""

    key: str
    title: str
    main: bool
    last: str
    summary: str
    gaps: str
    figure: Figure | None


@dataclass(frozen=True, slots=True)
class Axis:
    """What can lie along the figures: a value for each row of the metrics, None where the row has none."""

    key: str
    title: str
    values: list[float | None]


def panels(metrics: Sequence[Row], stages: Sequence[Stage]) -> list[Panel]:
    """One panel a numeric metric: the main ones in the order of `TITLES`, then all others by name.

    Each reward component follows the reward. The losses of different stages are different quantities, so each stage
    with a loss gets its own panel.
    """
    log = _Log(metrics, stages)
    present = {key for row in metrics for key, value in row.items() if _is_measure(key, value)}
    components = sorted(key for key in present if key.startswith("reward/"))
    main = [key for key in TITLES if key in present]
    after = main.index("reward") + 1 if "reward" in main else 0
    main[after:after] = components
    found: list[Panel] = []
    for key in main:
        losses = {log.positions[i] for i, row in enumerate(metrics) if number(row.get(key)) is not None}
        if key == "loss" and len(losses) > 1:
            for at in sorted(losses):
                rows = [i for i, position in enumerate(log.positions) if position == at]
                found.append(_panel(key, f"Loss, {log.label(at)}", True, log, rows))
        else:
            title = TITLES[key] if key in TITLES else f"Reward: {key.removeprefix('reward/')}"
            found.append(_panel(key, title, True, log, log.rows))
    for key in sorted(present - set(main), key=str.lower):
        found.append(_panel(key, key, False, log, log.rows))
    return found


def axes(metrics: Sequence[Row]) -> list[Axis]:
    """Steps, minutes and tokens since the start of the run; the last two only where the metrics tell them."""
    minutes = [None if seconds is None else seconds / 60 for seconds in since_start(metrics, "time")]
    found = [
        Axis("step", "step", since_start(metrics, "step")),
        Axis("time", "minutes", minutes),
        Axis("tokens", "tokens", since_start(metrics, "tokens")),
    ]
    return [axis for axis in found if axis.key == "step" or any(value is not None for value in axis.values)]


def since_start(metrics: Sequence[Row], key: str) -> list[float | None]:
    """A count that each stage begins anew (its steps, seconds or tokens), run on over the stages before."""
    found: list[float | None] = []
    stage, before, highest = None, 0.0, 0.0
    for row in metrics:
        if stage_of(row) != stage:
            stage, before = stage_of(row), highest
        count = number(row.get(key))
        found.append(None if count is None else before + count)
        highest = max(highest, found[-1] or 0.0)
    return found


def rolling_mean(values: Sequence[float | None], window: int) -> list[float | None]:
    """The mean of the `window` values around each place, over those that exist; None where the place has none."""
    half = window // 2
    means: list[float | None] = []
    for i, value in enumerate(values):
        around = [v for v in values[max(0, i - half) : i + half + 1] if v is not None]
        means.append(None if value is None else sum(around) / len(around))
    return means


def show(value: float, share: bool = False) -> str:
    """A metric's value in a few characters; `share` is of one, shown in percent."""
    if share:
        return f"{100 * value:.1f}%"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _is_measure(key: str, value: Any) -> bool:
    """Whether it is a number, or the null that stands for one that is not finite."""
    return key not in NOT_CURVES and (value is None or isinstance(value, int | float)) and not isinstance(value, bool)


class _Log:
    """The metrics with what every panel asks of them: where each row lies in the run, and in which stage.

    positions: the place in `stages` of each row's stage; -1 where `stages` does not name it.
    """

    def __init__(self, metrics: Sequence[Row], stages: Sequence[Stage]) -> None:
        place = {stage.index: at for at, stage in enumerate(stages)}
        self.metrics, self.stages = metrics, stages
        self.steps = since_start(metrics, "step")
        self.positions = [place.get(stage_of(row), -1) for row in metrics]
        self.rows = list(range(len(metrics)))

    def label(self, position: int) -> str:
        return self.stages[position].label if position >= 0 else "other"


def _panel(key: str, title: str, main: bool, log: _Log, rows: Sequence[int]) -> Panel:
    told = [i for i in rows if key in log.metrics[i]]
    values = [number(log.metrics[i][key]) for i in told]
    finite = [value for value in values if value is not None]
    gaps = f"no finite value at {len(told) - len(finite)} of {len(told)} steps" if len(finite) < len(told) else ""
    if not finite:
        return Panel(key, title, main, "", f"{title}: no finite value", gaps, None)
    share = key in SHARES and all(0 <= value <= 1 for value in finite)
    summary = (
        f"{title}: {show(finite[0], share)} at first, {show(finite[-1], share)} at last, "
        f"between {show(min(finite), share)} and {show(max(finite), share)} over {len(finite)} steps"
    )
    return Panel(key, title, main, show(finite[-1], share), summary, gaps, _figure(key, share, log, told))


def _figure(key: str, share: bool, log: _Log, rows: Sequence[int]) -> Figure:
    """A line a stage; where a stage has many steps it is pale, with the mean of the steps around drawn over it.

    `customdata` holds the row of each point, by which the page puts another axis under the figure; `meta` the stage.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    for at in sorted({log.positions[i] for i in rows}):
        inside = [i for i in rows if log.positions[i] == at]
        values = [number(log.metrics[i][key]) for i in inside]
        name, colour = theme.label(log.label(at)), theme.stage_colour(at)
        window = min(51, max(5, len(values) // 20 | 1))
        smooth = len(values) >= 4 * window and key != "learning_rate"  # a schedule has no noise
        lines = [(values, 1.1 if smooth else 1.8, 0.38 if smooth else 1.0, name)]
        if smooth:
            lines.append((rolling_mean(values, window), 2.2, 1.0, f"{name}, mean of {window}"))
        for line, width, opacity, title in lines:
            kept = keep_peaks(line, POINTS)
            figure.add_scatter(
                x=[log.steps[inside[i]] for i in kept],
                y=[line[i] for i in kept],
                customdata=[inside[i] for i in kept],
                meta=at,
                name=title,
                mode="lines+markers" if len(values) <= 12 else "lines",
                line={"color": colour, "width": width},
                marker={"color": colour, "size": 5},
                opacity=opacity,
                hovertemplate=f"%{{y:{'.1%' if share else '.4~g'}}}<extra>{title}</extra>",
            )
    ranges: dict[str, Any] = {"tickformat": ".0%"} if share else {}
    if key in ("length", "tokens_per_second", "completions_per_second", *SHARES):
        ranges["rangemode"] = "tozero"
    figure.update_layout(
        theme.layout(
            height=210,
            hovermode="x unified",
            xaxis=theme.axis(title={"text": "step", "standoff": 6}, showgrid=False, zeroline=False, nticks=6),
            yaxis=theme.axis(nticks=5, exponentformat="e", **ranges),
        )
    )
    return figure
