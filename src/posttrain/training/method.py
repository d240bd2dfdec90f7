"""A method: a choice of parts. A pipeline: methods one after the other (`sft() >> grpo()`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from posttrain.data.sampler import Sampler, Shuffled
from posttrain.models.causal import CausalPolicy
from posttrain.models.simulated import SimulatedPrecision
from posttrain.objective.estimator import Objective
from posttrain.objective.mixture import Mixture
from posttrain.reward.shaping import Shaping
from posttrain.rollout.strategy import Plain, Strategy
from posttrain.training.normaliser import Normaliser
from posttrain.training.settings import Settings
from posttrain.training.weights import WeightRule
from posttrain.trajectory import Group, PosttrainError, Prompt

Data = Literal["demonstrations", "preferences", "feedback", "prompts"]
OBJECTIVE_PARTS = ("advantage", "denominator", "masks", "aggregate", "divergences")


@dataclass(frozen=True)
class Method:
    """What to train on, with which objective, by which defaults.

    data: the rows it needs; `prompts` makes it an online method (rollouts, rewards).
    sampler: makes the sampler of a stage from its rows (prompts online, groups offline) and the seed.
    rollouts: how a step's groups come about. shaping: what becomes of their rewards, one after the other.
    critic: whether a value head is trained beside the policy; critic_warmup: steps in which it alone is.
    reference_decay: the reference policy follows the policy, reference = decay * reference + (1 - decay) * policy after
        every update; reference_every: it becomes the policy as it is after every so many updates. Without either it
        stays as it was at the stage's start.
    teacher: another policy (an id, a folder, or one that is loaded) for parts that look at one.
    normaliser: what gradients are divided by. weight_rule: what is done to weights after each update.
    precision: in which the linear layers multiply while the policy is updated (rollouts and evaluations are drawn from
        the policy as it is); None is the model's own.
    replay_experts: for mixtures of experts, whose routing the updates follow: that of the `trainer` before the step's
        first update, or of the `sampler` (the engine that drew the completions); None leaves it to the routers.
    arguments: what the method function was called with (for reports).
    """

    name: str
    objective: Objective | Mixture
    data: Data
    settings: Settings = field(default_factory=Settings)
    sampler: Callable[[Sequence[Prompt | Group], int], Sampler] = Shuffled
    rollouts: Strategy = field(default_factory=Plain)
    shaping: tuple[Shaping, ...] = ()
    critic: bool = False
    critic_warmup: int = 0
    reference_decay: float | None = None
    reference_every: int | None = None
    teacher: str | Path | CausalPolicy | None = None
    normaliser: Normaliser | None = None
    weight_rule: WeightRule | None = None
    precision: SimulatedPrecision | None = None
    replay_experts: Literal["trainer", "sampler"] | None = None
    arguments: dict[str, object] = field(default_factory=dict)

    @property
    def online(self) -> bool:
        return self.data == "prompts"

    @property
    def wants_demonstrations(self) -> bool:
        """Whether its prompts must carry worked solutions."""
        return self.online and getattr(self.rollouts, "demonstrations", False)

    @property
    def wants_reference(self) -> bool:
        """Whether the stage keeps a reference policy."""
        needs = self.objective.needs & {"reference_logp", "reference_hidden", "mismatched_kl"}
        return bool(needs) or any(getattr(p, "reference", False) for p in (self.rollouts, *self.shaping))

    def replace(self, **parts: object) -> Method:
        """A copy with other parts; parts of the objective may be given directly (`advantage=...`, `masks=...`)."""
        inner = {k: parts.pop(k) for k in OBJECTIVE_PARTS if k in parts}
        if inner:
            if not isinstance(self.objective, Objective):
                raise TypeError(f"{self.name} has a mixture of objectives; replace `objective` as a whole")
            parts["objective"] = self.objective.replace(**inner)
        return replace(self, **parts)  # type: ignore[arg-type]

    def with_settings(self, **settings: object) -> Method:
        """A copy with some settings changed."""
        return replace(self, settings=replace(self.settings, **settings))  # type: ignore[arg-type]

    def __rshift__(self, other: Method | Pipeline) -> Pipeline:
        return Pipeline((self,)) >> other


@dataclass(frozen=True)
class Pipeline:
    """Stages in order; each starts from the weights of the one before."""

    stages: tuple[Method, ...]

    def __rshift__(self, other: Method | Pipeline) -> Pipeline:
        return Pipeline(self.stages + stages_of(other))


def stages_of(method: Method | Pipeline) -> tuple[Method, ...]:
    """The methods of a pipeline, or the one. Raises PosttrainError for what does not train, such as a compression."""
    if isinstance(method, Pipeline):
        return method.stages
    if not isinstance(method, Method):
        name = getattr(method, "name", None) or repr(method)
        raise PosttrainError(
            f"{name} does not train; expected a training method (what compresses is for quantize, or a recipe)"
        )
    return (method,)
