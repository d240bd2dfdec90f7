"""What a rollout strategy or a reward shaping may use in one optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np

from posttrain.models.causal import CausalPolicy
from posttrain.rollout.engine import Engine, Progress
from posttrain.rollout.environment import Environment
from posttrain.rollout.rollout import rollout
from posttrain.trajectory import Group, PosttrainError, Prompt, Sampling

Score = Callable[[Sequence[Group]], None]  # fills `reward` and `rewards` of every trajectory, in place


@dataclass
class StepContext:
    """One step's surroundings. Everything random in it follows from `seed`, so a resumed run repeats it.

    step, total: the optimizer step (from 0) and how many there are. group: completions a prompt by the settings.
    policy: the policy as it is now. reference: opens the stage's reference policy, where a part needs one.
    teacher: another policy, where the method has one. weights: of the reward's components.
    metrics: figures that parts leave for the run's log.
    """

    step: int
    total: int
    engine: Engine
    sampling: Sampling
    group: int
    score: Score
    seed: int
    policy: CausalPolicy | None = None
    reference: Callable[[], AbstractContextManager[CausalPolicy]] | None = None
    teacher: CausalPolicy | None = None
    environment: Environment | None = None
    progress: Progress | None = None
    token_budget: int = 2048
    weights: Mapping[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    sampled: int = 0  # completions drawn in this step so far
    _calls: int = 0

    def sample(
        self,
        prompts: Sequence[Prompt],
        samples: int | None = None,
        *,
        sampling: Sampling | None = None,
        engine: Engine | None = None,
    ) -> list[Group]:
        """Draw unscored completions, `samples` a prompt (the group size by default). Every call draws fresh ones."""
        count = self.group if samples is None else samples
        seed = self.seed if not self._calls else self.derived_seed("call", self._calls)
        self._calls += 1
        self.sampled += count * len(prompts)
        return rollout(
            engine or self.engine, prompts, count, sampling or self.sampling, seed, self.environment, self.progress
        )

    def draw(self, prompts: Sequence[Prompt], samples: int | None = None) -> list[Group]:
        """Draw completions and score them."""
        groups = self.sample(prompts, samples)
        self.score(groups)
        return groups

    def derived_seed(self, *key: int | str) -> int:
        """A seed of its own for some purpose, far from those of the completions."""
        numbers = [int.from_bytes(k.encode(), "big") % 2**64 if isinstance(k, str) else k for k in key]
        return int(np.random.SeedSequence([self.seed % 2**64, *numbers]).generate_state(1, np.uint64)[0])

    def random(self, purpose: str) -> np.random.Generator:
        """Random numbers for a purpose, the same whenever the step is repeated."""
        return np.random.default_rng(self.derived_seed(purpose))

    def weight(self, component: str) -> float:
        """What a component of the reward weighs in its total."""
        if component not in self.weights:
            raise PosttrainError(
                f"the reward has no component {component!r}; expected one of {', '.join(self.weights) or 'none'}"
            )
        return self.weights[component]

    def required_policy(self) -> CausalPolicy:
        if self.policy is None:
            raise RuntimeError("this part needs the policy; it runs inside the training loop")
        return self.policy

    def required_teacher(self, who: str) -> CausalPolicy:
        if self.teacher is None:
            raise PosttrainError(f"{who} needs a teacher; give the method one: teacher=<model id, folder or policy>")
        return self.teacher
