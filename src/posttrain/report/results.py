"""What the run came to: the headline, and the accuracies before and after with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from posttrain.report import theme
from posttrain.report.curves import since_start
from posttrain.report.folder import Row, RunFolder, number, stage_of, step_of

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True, slots=True)
class Interval:
    """A share of one with its interval; the bounds are None where the run gave none."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        """`62% [55, 69]`, with one decimal where the interval is narrower than two points."""
        narrow = self.low is not None and self.high is not None and self.high - self.low < 0.02
        digits = 1 if narrow else 0
        text = f"{100 * self.value:.{digits}f}%"
        if self.low is None or self.high is None:
            return text
        return f"{text} [{100 * self.low:.{digits}f}, {100 * self.high:.{digits}f}]"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A row of `evaluations.jsonl` that tells an accuracy. `measures` has it first, then pass@k by rising k."""

    label: str
    task: str
    stage: int
    step: int
    n: int | None
    samples: int | None
    length: float | None
    seconds: float | None
    measures: dict[str, Interval]

    @property
    def accuracy(self) -> Interval:
        return self.measures["accuracy"]


def evaluations(folder: RunFolder) -> list[Evaluation]:
    """The evaluations in their order; of several with one label and task (a resumed run) the last."""
    unique: dict[tuple[str, str], Evaluation] = {}
    for row in folder.evaluations or []:
        accuracy = _interval(row, "accuracy")
        if row.get("label") != "comparison" and accuracy is not None:
            found = _evaluation(row, accuracy, folder.text("task"))
            unique[found.label, found.task] = found
    return list(unique.values())


def headline(folder: RunFolder) -> str:
    """The run in one sentence: `MODEL on TASK: held-out accuracy 5% [3, 9] → 62% [55, 69] in 11 min by sft, grpo`."""
    subject = short_name(folder.text("model")) or folder.text("name") or folder.path.name
    if task := folder.text("task"):
        subject += f" on {task}"
    how = ", ".join(stage.label for stage in folder.stages)
    took = duration(folder)
    how = (f" in {took}" if took else "") + (f" by {how}" if how else "")
    before, after = _ends(evaluations(folder), folder.text("task"))
    if before and after:
        story = f"held-out accuracy {before.accuracy} → {after.accuracy}{how}"
    elif after:
        story = f"held-out accuracy {after.accuracy} {after.label}{how}"
    elif before:
        story = f"held-out accuracy {before.accuracy} before training, none yet after it;{how or ' no stages'}"
    else:
        packs = bool(folder.stages) and all(stage.kind == "compression" for stage in folder.stages)
        story = f"{'compressed' if packs else 'trained'}{how}, without an evaluation"
    status = str(folder.run.get("status") or "")
    return f"{subject}: {story}" + (f" ({status})" if status not in ("", "finished") else "")


def comparisons(folder: RunFolder) -> list[str]:
    """A sentence for each comparison of before with after: the difference in percentage points, its interval and p."""
    found: list[str] = []
    for row in folder.evaluations or []:
        difference = number(row.get("difference"))
        if row.get("label") != "comparison" or difference is None:
            continue
        low, high, p, n = (number(row.get(key)) for key in ("low", "high", "p", "n"))
        text = f"{100 * difference:+.1f} percentage points"
        verdict = ""
        if low is not None and high is not None:
            text += f" [{100 * low:+.1f}, {100 * high:+.1f}]"
            verdict = "A rise" if low > 0 else "A fall" if high < 0 else "No clear difference"
        if p is not None:
            text += ", p < 0.001" if p < 0.001 else f", p = {p:.3f}"
        if n is not None:
            text += f", {n:.0f} problems"
        found.append(f"{verdict}: {text}." if verdict else f"{text}.")
    return found


def before_after(rows: Sequence[Evaluation], positions: Mapping[int, int]) -> Figure:
    """Bars of one task's evaluations with their intervals: accuracy, and below it pass@k where it was measured.

    positions: the place of each stage's index in the run, for the bars' colours.
    """
    import plotly.graph_objects as go

    names = list(dict.fromkeys(name for row in rows for name in row.measures))
    bars = [(name, row, row.measures[name]) for name in names for row in rows if name in row.measures]
    texts = [theme.label(row.label if len(names) == 1 else f"{name}, {row.label}") for name, row, _ in bars]
    values = [interval.value for _, _, interval in bars]
    figure = go.Figure(
        go.Bar(
            x=values,
            y=list(range(len(bars))),
            orientation="h",
            width=0.56,
            marker={"color": [theme.stage_colour(positions.get(row.stage, -1)) for _, row, _ in bars]},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [max(0.0, (i.value if i.high is None else i.high) - i.value) for _, _, i in bars],
                "arrayminus": [max(0.0, i.value - (i.value if i.low is None else i.low)) for _, _, i in bars],
                "color": theme.NEUTRAL,
                "thickness": 1.6,
                "width": 5,
            },
            customdata=[str(interval) for _, _, interval in bars],
            hovertemplate="%{customdata}<extra></extra>",
        )
    )
    figure.update_layout(
        theme.layout(
            height=34 + 46 * len(bars),
            xaxis=theme.axis(tickformat=".0%", range=[0, 1.27], tickvals=[0, 0.25, 0.5, 0.75, 1], showline=False),
            yaxis=theme.axis(
                tickvals=list(range(len(bars))),
                ticktext=texts,
                range=[len(bars) - 0.5, -0.5],
                showgrid=False,
                zeroline=False,
                tickfont={"color": theme.NEUTRAL, "size": 13},
            ),
            annotations=[
                {
                    "x": interval.value if interval.high is None else max(interval.high, interval.value),
                    "y": place,
                    "text": f"<b>{interval}</b>",
                    "showarrow": False,
                    "xanchor": "left",
                    "xshift": 10,
                    "font": {"size": 13, "color": theme.NEUTRAL},
                }
                for place, (_, _, interval) in enumerate(bars)
            ],
        )
    )
    return figure


def duration(folder: RunFolder) -> str:
    """How long the run took, by the clock or else by the time its steps took; empty where neither is known."""
    seconds = max((time or 0.0 for time in since_start(folder.metrics or [], "time")), default=0.0)
    created, finished = _moment(folder.run.get("created")), _moment(folder.run.get("finished"))
    if created and finished and (created.tzinfo is None) == (finished.tzinfo is None):
        seconds = (finished - created).total_seconds()
    if seconds <= 0:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def short_name(model: str) -> str:
    """The name of a model that may be given by a path or a hub id: its last part."""
    return PurePath(model.rstrip("/")).name or model


def _ends(found: Sequence[Evaluation], task: str) -> tuple[Evaluation | None, Evaluation | None]:
    """The evaluations before and after, on the run's task or else on the first that was evaluated."""
    if found and task not in {row.task for row in found}:
        task = found[0].task
    rows = [row for row in found if row.task == task]
    before = next((row for row in rows if row.label == "before"), None)
    after = next((row for row in reversed(rows) if row.label != "before"), None)
    return before, after


def _evaluation(row: Row, accuracy: Interval, task: str) -> Evaluation:
    measures = {"accuracy": accuracy}
    pass_at_k = row.get("pass_at_k")
    if isinstance(pass_at_k, Mapping):
        for k in sorted(pass_at_k, key=lambda k: (len(k), k)):
            if isinstance(pass_at_k[k], Mapping) and (interval := _interval(pass_at_k[k], "value")):
                measures[f"pass@{k}"] = interval
    n, samples = number(row.get("n")), number(row.get("samples"))
    return Evaluation(
        label=str(row.get("label") or "evaluation"),
        task=str(row.get("task") or task),
        stage=stage_of(row),
        step=step_of(row),
        n=None if n is None else int(n),
        samples=None if samples is None else int(samples),
        length=number(row.get("length")),
        seconds=number(row.get("seconds")),
        measures=measures,
    )


def _interval(row: Mapping[str, Any], key: str) -> Interval | None:
    value = number(row.get(key))
    return None if value is None else Interval(value, number(row.get("low")), number(row.get("high")))


def _moment(value: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return None
