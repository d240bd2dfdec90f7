"""A reward: named components with weights, summed; a component that fails is counted and scored by a declared value."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.reward.fault import Fault, FaultKind
from posttrain.reward.isolation import Sandbox, limits_from
from posttrain.reward.scorers import Answer, Scorer, evaluate, finite_number, keywords_of, scorer_from
from posttrain.reward.seeding import seed_by_call
from posttrain.trajectory import Finish, Group, PosttrainError, Prompt


@dataclass(frozen=True, slots=True)
class Score:
    """What one completion earned.

    total: the weighted sum of `parts`. parts: each component's own value, before its weight.
    errors: component to message, where a component failed (its part is then the reward's `on_error`).
    """

    total: float
    parts: dict[str, float]
    errors: dict[str, str] = field(default_factory=dict)


class Reward:
    """The weighted sum of named components.

    components: name to (callable, weight). A callable takes `(completion, prompt)`, and by keyword `tokens` and
        `finish` where its signature has them (`verifiers.Verifier`). One that answers many calls at a time has
        `batch(answers)`, which returns a number or a `Fault` for each (`isolation.Isolated`).
    on_error: the value of a component that raises, or returns anything but a finite number.
    faults: how often each component failed since this object was made, by kind; first_error: the first one's message.
    """

    def __init__(self, components: Mapping[str, tuple[Scorer, float]], on_error: float = 0.0) -> None:
        if not components:
            raise PosttrainError("a reward needs at least one component; got none")
        self.components = dict(components)
        self.on_error = _finite(on_error, "reward: on_error")
        self.weights = {name: _finite(weight, f"reward {name}: weight") for name, (_, weight) in components.items()}
        self._keywords = {name: keywords_of(name, function) for name, (function, _) in components.items()}
        self.faults: dict[str, Counter[FaultKind]] = {name: Counter() for name in components}
        self.first_error: str | None = None

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}: {self.weights[name]:g} × {f!r}" for name, (f, _) in self.components.items())
        return f"Reward({inside})"

    def score(self, prompt: Prompt, completion: str, *, tokens: int, finish: Finish) -> Score:
        """Score one completion text.

        tokens: length of the completion, end token included. finish: why it ended.
        """
        return self.score_all([Answer(prompt, completion, tokens, finish)])[0]

    def score_all(self, answers: Sequence[Answer]) -> list[Score]:
        """Score many completions, in their order."""
        found = self.outcomes(answers)
        return [self._score([outcomes[i] for outcomes in found]) for i in range(len(answers))]

    def outcomes(self, answers: Sequence[Answer], *, seeded: bool = False) -> list[Sequence[float | Fault]]:
        """What each component makes of each answer; nothing is counted.

        seeded: random numbers follow from the call, so that it does not matter which process makes it.
        """
        found: dict[str, Sequence[float | Fault]] = {}
        here: list[tuple[str, list[float | Fault], Scorer, tuple[str, ...]]] = []
        for name, (function, _) in self.components.items():
            if hasattr(function, "batch"):
                found[name] = function.batch(answers)
            else:
                found[name] = values = list[float | Fault]()
                here.append((name, values, function, self._keywords[name]))
        for answer in answers:  # one completion after the other: a component may draw random numbers
            for name, values, function, keywords in here:
                if seeded:
                    seed_by_call(name, answer.prompt.key, answer.completion)
                values.append(evaluate(function, answer, keywords))
        return [found[name] for name in self.components]

    def _score(self, outcomes: Sequence[float | Fault]) -> Score:
        """The score of one completion from what its components gave, in their order; failures are counted."""
        parts: dict[str, float] = {}
        errors: dict[str, str] = {}
        for name, outcome in zip(self.components, outcomes, strict=True):
            if isinstance(outcome, Fault):
                parts[name] = self.on_error
                errors[name] = f"{name}: {outcome.message}"
                self.faults[name][outcome.kind] += 1
                self.first_error = self.first_error or errors[name]
            else:
                parts[name] = outcome
        total = math.fsum(self.weights[name] * value for name, value in parts.items())
        return Score(total, parts, errors)

    @property
    def errors(self) -> dict[str, int]:
        """Failures by component."""
        return {name: kinds.total() for name, kinds in self.faults.items()}

    def failures(self) -> str:
        """Which components failed how often, for a note; kinds are told where a process was ended. Empty for none."""
        told = []
        for name, kinds in self.faults.items():
            hard = ", ".join(f"{kind} {count}" for kind, count in kinds.items() if kind != "raised")
            if kinds.total():
                told.append(f"{name} {kinds.total()}" + (f" ({hard})" if hard else ""))
        return ", ".join(told)

    def afresh(self) -> Reward:
        """The same reward with failures counted from now on."""
        other = copy.copy(self)
        other.faults, other.first_error = {name: Counter() for name in self.components}, None
        return other

    def score_groups(self, groups: Iterable[Group]) -> None:
        """Fill `reward` and `rewards` of every trajectory in `groups`, in place, from its `text`."""
        groups = list(groups)
        members = [trajectory for group in groups for trajectory in group.trajectories]
        for trajectory, score in zip(members, self.score_all(answers_of(groups)), strict=True):
            trajectory.reward, trajectory.rewards = score.total, score.parts


def answers_of(groups: Iterable[Group]) -> list[Answer]:
    """What there is to score in groups, in their order."""
    answers = []
    for group in groups:
        if group.prompt is None:
            raise PosttrainError("a group without a prompt cannot be scored; give Group(..., prompt=Prompt)")
        for t in group.trajectories:
            answers.append(Answer(group.prompt, t.text, t.actions, t.finish))
    return answers


def reward_from(spec: Any) -> Reward:
    """Build a reward from what a recipe or a caller may write.

    A `Reward` is returned as it is. A callable, a verifier's name ("math_verify") or an import path
    ("package.module:function", "folder/file.py:function") becomes the only component, with weight 1. A mapping holds
    components: `{math_verify: 1.0, format: {pattern: "...", weight: 0.2}, "rewards.py:brief": 0.1, on_error: -1}`.
    A key is a verifier's name or an import path, unless its value names one: `{polite: {verifier: regex, ...}}`.
    A value is a weight, or a mapping of arguments and `weight`. `isolate: true`, or `isolate: {timeout: 5, memory:
    2GiB}`, has all components called in processes of their own (`isolation.Limits`). Raises PosttrainError, naming the
    nearest known name.
    """
    if isinstance(spec, Reward):
        return spec
    if isinstance(spec, str):
        return Reward({_component_name(spec): (scorer_from(spec, {}), 1.0)})
    if callable(spec):
        return Reward({getattr(spec, "__name__", type(spec).__name__): (spec, 1.0)})
    if not isinstance(spec, Mapping):
        raise PosttrainError(f"reward: got {spec!r}; expected a name, an import path, a mapping or a callable")
    components: dict[str, tuple[Scorer, float]] = {}
    sandbox = _sandbox(spec.get("isolate", False))
    for key, value in spec.items():
        if key in ("on_error", "isolate"):
            continue
        name = _component_name(str(key))
        if name in components:
            raise PosttrainError(f"reward: two components are called {name!r}; name one: {{mine: {{verifier: {key}}}}}")
        source, arguments, weight = _component(str(key), value)
        scorer = source if callable(source) else scorer_from(source, arguments)
        if sandbox is not None:
            scorer = sandbox.admit(name, source, arguments, keywords_of(name, scorer))
        components[name] = (scorer, weight)
    return Reward(components, on_error=spec.get("on_error", 0.0))


def _sandbox(isolate: Any) -> Sandbox | None:
    """Where components are called when they are isolated."""
    limits = limits_from(isolate)
    return None if limits is None else Sandbox(limits)


def _component(key: str, value: Any) -> tuple[str | Scorer, dict[str, Any], float]:
    """(name or callable, arguments, weight) for one entry of a reward mapping."""
    if isinstance(value, Mapping):
        arguments = {str(name): argument for name, argument in value.items() if name not in ("weight", "verifier")}
        return str(value.get("verifier", key)), arguments, value.get("weight", 1.0)
    if callable(value):
        return value, {}, 1.0
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise PosttrainError(f"reward {key}: got {value!r}; expected a weight, or a mapping of arguments and weight")
    return key, {}, 1.0 if value is None else value


def _component_name(spec: str) -> str:
    """ "package.module:function" is called by its function."""
    return spec.rpartition(":")[2]


def _finite(value: Any, what: str) -> float:
    try:
        return finite_number(value)
    except (TypeError, ValueError) as error:
        raise PosttrainError(f"{what} is {value!r}; expected a finite number") from error
