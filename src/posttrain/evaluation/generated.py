"""Tasks whose problems a `reasoning-gym` generator makes: as many as wanted, no two alike, scored by the generator."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from posttrain.evaluation.solutions import Solver, solver
from posttrain.evaluation.task import Task, TaskItem
from posttrain.reward.names import unknown
from posttrain.reward.reward import Reward, reward_from
from posttrain.reward.verifiers import ReasoningGym
from posttrain.trajectory import PosttrainError, Sampling

_CHUNK = 500  # problems made by one generator; fixed, so that the first problems do not depend on how many are wanted


def reasoning_gym(
    task: str,
    /,
    *,
    train: int = 2000,
    heldout: int = 200,
    seed: int = 0,
    instruction: str | None = None,
    solution: str | Solver = "answer",
    system: str | None = None,
    sampling: Sampling | None = None,
    reward: Any = None,
    name: str | None = None,
    **config: Any,
) -> Task:
    """A task of the `reasoning-gym` library, by its registered name.

    Args:
        task: such as "chain_sum".
        train, heldout: numbers of problems. All questions differ, within and between the splits. The held-out problems
            depend on `seed` and `config` alone, so runs with other amounts of training data are compared on the same.
        seed: of the generator.
        instruction: put under every question.
        solution: what a demonstration is: "answer", "steps" (worked, where steps are known) or a callable that takes
            the generator's entry.
        reward: as for `reward_from`; None is the generator's own score alone. A completion is right where the
            component `reasoning_gym` is 1 (the total, where a reward without it is given).
        config: the generator's settings; a pair `terms=[2, 3]` stands for `min_terms=2, max_terms=3`.

    Raises:
        PosttrainError: unknown task or setting (with the nearest names), values the generator refuses, and too few
            distinct problems (with how many there are).
    """
    settings = _settings(task, config)
    if min(train, heldout) < 0:
        raise PosttrainError(f"reasoning_gym {task}: train={train}, heldout={heldout}; expected numbers from 0")
    solve = solver(task, solution)
    items = [
        TaskItem(
            prompt=f"{entry['question']}\n{instruction}" if instruction else str(entry["question"]),
            answer=entry["answer"],
            meta={"entry": entry},
            solution=solve(entry),
        )
        for entry in _distinct(task, settings, heldout + train, seed)
    ]
    score = _with_settings(reward_from("reasoning_gym" if reward is None else reward), ReasoningGym(task, settings))
    detail = "".join(f", {key}={value}" for key, value in settings.items())
    return Task(
        name=name or task,
        train=items[heldout:],
        heldout=items[:heldout],
        reward=score,
        threshold=0.999,
        metric="reasoning_gym" if "reasoning_gym" in score.components else None,
        system=system,
        sampling=sampling or Sampling(),
        description=f"reasoning-gym {task}{detail}: {train} training and {heldout} held-out problems, seed {seed}",
    )


def _with_settings(reward: Reward, scorer: ReasoningGym) -> Reward:
    """The reward, in which a bare `reasoning_gym` means this task's scorer with this task's settings."""
    if all(function != ReasoningGym() for function, _ in reward.components.values()):
        return reward
    components = {
        name: (scorer if function == ReasoningGym() else function, weight)
        for name, (function, weight) in reward.components.items()
    }
    return Reward(components, reward.on_error)


def _settings(task: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The generator's settings, pairs resolved; raises where the task or a setting is unknown, or a value refused."""
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise unknown("reasoning-gym task", task, DATASETS)
    fields = {f.name for f in dataclasses.fields(DATASETS[task][1])} - {"seed", "size"}
    pairs = {f.removeprefix("min_") for f in fields if f.startswith("min_") and f"max_{f[4:]}" in fields}
    settings: dict[str, Any] = {}
    for key, value in config.items():
        if key in pairs - fields:
            if not isinstance(value, list | tuple) or len(value) != 2:
                raise PosttrainError(f"reasoning_gym {task}: {key} is {value!r}; expected a pair [lowest, highest]")
            values = {f"min_{key}": value[0], f"max_{key}": value[1]}
        elif key in fields:
            values = {key: value}
        else:
            own = {p.name for p in inspect.signature(reasoning_gym).parameters.values() if p.kind is p.KEYWORD_ONLY}
            raise unknown(f"setting of {task}", key, fields | pairs | own)
        if twice := settings.keys() & values.keys() or values.keys() & (config.keys() - {key}):
            raise PosttrainError(f"reasoning_gym {task}: {' and '.join(sorted(twice))} given twice; keep one spelling")
        settings.update(values)
    _generator(task, settings, seed=0)
    return settings


def _generator(task: str, settings: Mapping[str, Any], seed: int) -> Any:
    from reasoning_gym.factory import create_dataset

    try:
        return create_dataset(task, **{"seed": seed, "size": _CHUNK, **settings})
    except (AssertionError, ValueError, TypeError, KeyError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in settings.items()) or "its defaults"
        raise PosttrainError(f"reasoning_gym {task} refuses {given}: {str(error) or type(error).__name__}") from error


def _distinct(task: str, settings: Mapping[str, Any], wanted: int, seed: int) -> list[dict[str, Any]]:
    """The first `wanted` entries with different questions.

    A generator counts as exhausted after ten times as many repeats in a row as it has given problems: were there one
    more, equally likely, it would have been met with probability 1 - exp(-10).
    """
    entries: dict[str, dict[str, Any]] = {}
    repeats = 0
    for entry in _stream(task, settings, seed) if wanted else ():
        if entry["question"] in entries:
            repeats += 1
        else:
            repeats = 0
            entries[entry["question"]] = entry
        if len(entries) == wanted:
            break
        if repeats > max(_CHUNK, 10 * len(entries)):
            raise PosttrainError(
                f"reasoning_gym {task} has only {len(entries)} distinct problems with these settings; "
                f"{wanted} were asked for (train and heldout together): ask for fewer or widen the settings"
            )
    return list(entries.values())


def _stream(task: str, settings: Mapping[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """Problems without end.

    A generator adds a problem's index to its seed, so seeds 0 and 1 would give nearly the same problems: the seed is
    hashed to a far start.
    """
    digest = hashlib.blake2b(f"{task}:{seed}".encode(), digest_size=4).digest()
    start = int.from_bytes(digest, "big") % 2**31
    while True:
        generator = _generator(task, settings, start)
        for index in range(_CHUNK):
            with _own_random_state(start + index):  # a few generators draw from the global state
                try:
                    entry = generator[index]
                except Exception as error:  # with some settings a generator cannot make a problem at all
                    raise PosttrainError(
                        f"reasoning_gym {task}: its generator failed ({type(error).__name__}: {error})"
                    ) from error
            yield entry
        start += _CHUNK


@contextlib.contextmanager
def _own_random_state(seed: int) -> Iterator[None]:
    """Seed the global generators of `random` and NumPy, and put back their states afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
