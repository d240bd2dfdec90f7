"""The tasks one can ask for by name: generated problems, rows of a file, GSM8K-style files, multiple choice."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_type_hints

from posttrain.data.formats import PromptAnswer, parse
from posttrain.data.rows import BadRow, RawRow
from posttrain.data.sources import EXTENSIONS, Source, read_rows
from posttrain.evaluation.choices import multiple_choice
from posttrain.evaluation.generated import reasoning_gym
from posttrain.evaluation.solutions import answer_line
from posttrain.evaluation.task import Task, TaskItem, without_repeats
from posttrain.reward.names import unknown
from posttrain.reward.reward import reward_from
from posttrain.trajectory import PosttrainError, Sampling

__all__ = ["BUILDERS", "from_rows", "gsm8k", "multiple_choice", "reasoning_gym", "task_from"]


def from_rows(
    source: Source,
    *,
    reward: Any = "exact_match",
    heldout: float | Source = 0.1,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
    instruction: str | None = None,
    system: str | None = None,
    sampling: Sampling | None = None,
    threshold: float = 1.0,
    metric: str | None = None,
    name: str | None = None,
) -> Task:
    """A task from rows with a prompt and an answer (and, for demonstrations, a `solution` or `completion`).

    Args:
        source: a file (.jsonl, .json, .csv, .parquet), a hub id, or rows in memory.
        reward: as for `reward_from`.
        heldout: what to hold out: a share of the rows (0.1), a number of rows (200), or another source. Which rows is
            decided by a hash of the prompt and `seed`, so rows added later leave the others where they are.
        columns: the file's own column names to standard ones: `{"query": "prompt"}`.
        instruction: put under every prompt that is text.
        threshold, metric: what counts as right (`Task`).

    A prompt that occurs again is dropped, and so is a training row whose prompt is held out (the description counts
    them). Raises PosttrainError for a row that cannot be read, with its place.
    """

    def items(rows: Source) -> list[TaskItem]:
        return [_item(row, columns or {}, instruction) for row in read_rows(rows)]

    if isinstance(heldout, int | float):
        given = items(source)
        kept = without_repeats(given, set())
        held, train = _split(kept, heldout, seed, name or _name(source))
        dropped = len(given) - len(kept)
    else:
        seen: set[int] = set()
        given_held, given = items(heldout), items(source)
        held, train = without_repeats(given_held, seen), without_repeats(given, seen)
        dropped = len(given_held) + len(given) - len(held) - len(train)
    repeats = f", {dropped} repeated prompts dropped" if dropped else ""
    return Task(
        name=name or _name(source),
        train=train,
        heldout=held,
        reward=reward_from(reward),
        threshold=threshold,
        metric=metric,
        system=system,
        sampling=sampling or Sampling(),
        description=f"{_name(source)}: {len(train)} training and {len(held)} held-out problems{repeats}",
    )


def gsm8k(source: Source, heldout: float | Source = 0.1, *, reward: Any = "last_number", **options: Any) -> Task:
    """Grade-school arithmetic in the layout of GSM8K: `question`, and `answer` with the result behind "####".

    The result is compared as a number; the text before it is the worked solution, without the `<<...>>` marks of a
    calculator. `heldout` and the other options are those of `from_rows`.
    """
    task = from_rows(source, heldout=heldout, reward=reward, **{"name": "gsm8k", **options})
    for item in (*task.train, *task.heldout):
        if item.solution is not None:
            item.solution = re.sub(r"<<.*?>>", "", item.solution)
    return task


BUILDERS: dict[str, Callable[..., Task]] = {
    "file": from_rows,
    "gsm8k": gsm8k,
    "multiple_choice": multiple_choice,
    "reasoning_gym": reasoning_gym,
}


def task_from(spec: Any) -> Task:
    """Build a task from what a recipe may write.

    A `Task` is returned as it is. Text is the name of a `reasoning-gym` task, or the path of a file of rows. A mapping
    names its kind and source in one entry, and the builder's arguments in the others:
    `{reasoning_gym: chain_sum, terms: [2, 3], train: 2000}`, `{gsm8k: train.jsonl, heldout: test.jsonl}`,
    `{file: rows.jsonl, reward: math_verify, heldout: 0.1}`, `{multiple_choice: rows.jsonl}`.
    Raises PosttrainError for what is unknown or of a wrong kind, with the nearest names.
    """
    if isinstance(spec, Task):
        return spec
    if isinstance(spec, str | Path):
        kind = "file" if Path(spec).suffix in (*EXTENSIONS, ".gz") else "reasoning_gym"
        return BUILDERS[kind](spec)
    if not isinstance(spec, Mapping):
        raise PosttrainError(f"task: got {spec!r}; expected a name, a file, or a mapping such as {_EXAMPLE}")
    kinds = [key for key in spec if key in BUILDERS]
    if len(kinds) != 1:
        found = f"got {' and '.join(kinds)}" if kinds else f"got only {', '.join(map(str, spec)) or 'nothing'}"
        raise PosttrainError(f"task: {found}; expected one of {', '.join(BUILDERS)}, as in {_EXAMPLE}")
    (kind,) = kinds
    options = {str(key): value for key, value in spec.items() if key != kind}
    if isinstance(options.get("sampling"), Mapping):
        options["sampling"] = _sampling(options["sampling"])
    _check_options(kind, spec[kind], options)
    return BUILDERS[kind](spec[kind], **options)


_EXAMPLE = "{reasoning_gym: chain_sum, train: 2000, heldout: 200}"


_PLAIN = {int: "a whole number", float: "a number", str | None: "text"}


def _check_options(kind: str, source: Any, options: Mapping[str, Any]) -> None:
    """Raise for a source or an option of a wrong type, and for an option the builder does not know."""
    if not isinstance(source, str | Path | list):
        raise PosttrainError(f"task: {kind} is {source!r}; expected a name or a path")
    hints = get_type_hints(BUILDERS[kind])
    if kind == "gsm8k":
        hints = get_type_hints(from_rows) | hints
    known = hints.keys() - {"source", "task", "config", "options", "return"}
    for key, value in options.items():
        if key not in known and kind != "reasoning_gym":  # which checks its generator's settings itself
            raise unknown(f"option of {kind}", key, known)
        hint = hints.get(key)
        if hint in _PLAIN and (
            isinstance(value, bool) or not isinstance(value, int | float if hint is float else hint)
        ):
            raise PosttrainError(f"task: {key} is {value!r}; expected {_PLAIN[hint]}")


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    known = [f.name for f in dataclasses.fields(Sampling)]
    for key in settings:
        if key not in known:
            raise unknown("sampling setting", key, known)
    values: dict[str, Any] = dict(settings)
    if isinstance(values.get("stop"), list):
        values["stop"] = tuple(values["stop"])
    return Sampling(**values)


def _name(source: Source) -> str:
    return Path(source).name.partition(".")[0] if isinstance(source, str | Path) else "rows"


def _item(row: RawRow, columns: Mapping[str, str], instruction: str | None) -> TaskItem:
    if row.error is not None:
        raise row.error
    try:
        parsed = cast(PromptAnswer, parse(row.values, "prompts", columns))
    except BadRow as error:
        raise error.at(row.origin) from error
    meta = dict(parsed.meta)
    solution = meta.pop("solution", None) or meta.pop("completion", None)
    if not isinstance(solution, str):
        solution = None if parsed.answer is None else answer_line(str(parsed.answer))
    prompt = parsed.prompt if isinstance(parsed.prompt, str) else list(parsed.prompt)
    if instruction and isinstance(prompt, str):
        prompt = f"{prompt}\n{instruction}"
    return TaskItem(prompt, parsed.answer, meta, solution)


def _split(items: Sequence[TaskItem], heldout: float, seed: int, name: str) -> tuple[list[TaskItem], list[TaskItem]]:
    """(held out, train): held out are the items whose hash with the seed is lowest; both keep the order of the rows."""
    count = round(heldout * len(items)) if isinstance(heldout, float) else heldout
    if isinstance(heldout, bool) or not 0 <= count <= len(items) or (isinstance(heldout, float) and heldout > 1):
        raise PosttrainError(
            f"task {name}: heldout is {heldout!r}; expected a share from 0 to 1, or a number up to {len(items)}"
        )
    if isinstance(heldout, float) and heldout > 0:
        count = max(1, count)

    def rank(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}:{items[index].key}".encode(), digest_size=8).digest()

    chosen = set(sorted(range(len(items)), key=rank)[:count])
    held = [item for index, item in enumerate(items) if index in chosen]
    return held, [item for index, item in enumerate(items) if index not in chosen]
