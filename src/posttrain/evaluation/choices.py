"""Multiple choice by likelihood: rows with options, and which option a model finds most likely."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posttrain.data.rows import BadRow, RawRow
from posttrain.data.sources import Source, read_rows
from posttrain.evaluation.task import Split, Task, TaskItem, without_repeats
from posttrain.reward.names import unknown
from posttrain.reward.reward import reward_from
from posttrain.trajectory import PosttrainError, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Sum of the log-probabilities of each trajectory's action tokens, in nats.
Likelihood = Callable[[list[Trajectory]], Sequence[float]]

METRICS = ("normalised", "total")


def multiple_choice(
    source: Source,
    *,
    train: Source | None = None,
    metric: str = "normalised",
    instruction: str | None = None,
    system: str | None = None,
    name: str | None = None,
) -> Task:
    """Problems with options, judged by the likelihood a model gives to each.

    Args:
        source: rows with `question` (or `prompt`), `options` (or `choices`: a list, or `{"text": ..., "label": ...}`)
            and `label` (or `answerKey`, `answer`): an index from 0, a letter, an option's own label or its text.
        train: rows to train on, in the same layout; the right option is the demonstration.
        metric: which option counts as chosen: "normalised", the highest log-likelihood per character, or "total".
        instruction: put under every question.
    """
    if metric not in METRICS:
        raise unknown("metric of multiple choice", metric, METRICS)
    seen: set[int] = set()
    held, fit = (
        without_repeats([_item(row, instruction) for row in read_rows(rows)], seen) if rows is not None else []
        for rows in (source, train)
    )
    title = Path(source).name.partition(".")[0] if isinstance(source, str | Path) else "rows"
    return Task(
        name=name or title,
        train=fit,
        heldout=held,
        reward=reward_from("exact_match"),
        metric=metric,
        system=system,
        description=f"{title}: {len(held)} multiple-choice problems by {metric} log-likelihood",
    )


def option_scores(
    task: Task, tokenizer: PreTrainedTokenizerBase, likelihood: Likelihood, split: Split, limit: int | None = None
) -> list[list[float]]:
    """Log-likelihood of every option of every problem, given its prompt, in nats: `[problems][options]`.

    An option is tokenized by itself and put behind the prompt, after a space where the prompt is plain text; no end
    token is counted.
    """
    trajectories: list[Trajectory] = []
    items = task.items(split)[:limit]
    for prompt, item in zip(task.prompts(tokenizer, split, limit), items, strict=True):
        space = "" if prompt.messages or prompt.text[-1:].isspace() else " "
        for option in item.options:
            tokens = torch.tensor(tokenizer.encode(space + option, add_special_tokens=False), dtype=torch.int64)
            mask = torch.cat(
                [torch.zeros(len(prompt.tokens), dtype=torch.bool), torch.ones(len(tokens), dtype=torch.bool)]
            )
            trajectories.append(Trajectory(torch.cat([prompt.tokens, tokens]), mask, source="expert", text=option))
    scores = [float(score) for score in likelihood(trajectories)]
    if len(scores) != len(trajectories) or not all(math.isfinite(score) for score in scores):
        raise PosttrainError(
            f"task {task.name}: likelihood gave {len(scores)} values for {len(trajectories)} options, "
            "or one that is not finite; expected a finite log-likelihood for each"
        )
    given = iter(scores)
    return [[next(given) for _ in item.options] for item in items]


def choose(item: TaskItem, scores: Sequence[float]) -> dict[str, int]:
    """The index of the option chosen by each of `METRICS` (the first where several are best)."""
    by_character = [score / len(option) for score, option in zip(scores, item.options, strict=True)]
    return {
        name: max(range(len(values)), key=values.__getitem__)
        for name, values in (("normalised", by_character), ("total", list(scores)))
    }


def _item(row: RawRow, instruction: str | None) -> TaskItem:
    if row.error is not None:
        raise row.error
    values = row.values
    question = values.get("question", values.get("prompt"))
    options, labels = _options(values.get("options", values.get("choices")))
    answer = next((values[key] for key in ("label", "answerKey", "answer") if values.get(key) is not None), None)
    if not isinstance(question, str) or len(set(options)) < max(2, len(options)) or answer is None:
        raise BadRow(
            "no multiple choice",
            f"the row has {', '.join(values) or 'no columns'}; expected question (text), options (two or more, all "
            "different) and label (an index from 0, a letter or the option's text)",
            row.origin,
        )
    label = _label(answer, options, labels)
    if label is None:
        raise BadRow("no multiple choice", f"label {answer!r} names none of the options {options}", row.origin)
    prompt = f"{question}\n{instruction}" if instruction else question
    return TaskItem(prompt, options[label], solution=options[label], options=tuple(options), label=label)


def _options(value: Any) -> tuple[list[str], list[Any]]:
    """The options' texts and their own labels; no texts where the value holds none."""
    labels: Any = []
    if isinstance(value, Mapping):
        value, labels = value.get("text"), value.get("label") or []
    if not isinstance(value, list | tuple) or not all(isinstance(option, str) and option for option in value):
        return [], []
    return list(value), list(labels)


def _label(answer: Any, options: list[str], labels: list[Any]) -> int | None:
    """The index of the right option; None where `answer` names none."""
    if isinstance(answer, str):
        for names in (labels, options, [chr(ord("A") + i) for i in range(len(options))]):
            if answer in names:
                return names.index(answer)
        answer = int(answer) if answer.isdecimal() else -1
    return answer if isinstance(answer, int) and 0 <= answer < len(options) else None
