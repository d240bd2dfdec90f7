"""What can never work is refused before anything is computed."""

from __future__ import annotations

from posttrain.models.causal import CausalPolicy
from posttrain.models.simulated import linear_layers
from posttrain.processes import here
from posttrain.rollout.strategy import Plain
from posttrain.training.ahead import corrects
from posttrain.training.collect import Source
from posttrain.training.method import Method
from posttrain.training.parallel import check_batch
from posttrain.trajectory import PosttrainError


def check(policy: CausalPolicy, method: Method, source: Source, *, judged: bool) -> None:
    """PosttrainError where a method cannot train this policy on that source. judged: something is held out."""
    name, settings, rows = method.name, method.settings, source.rows
    least = method.objective.minimum_group
    if method.online and settings.group < least:
        raise PosttrainError(
            f"{name}: group is {settings.group}; group-normalised advantages need at least {least} completions a prompt"
        )
    if method.online and settings.temperature == 0:
        raise PosttrainError(f"{name}: temperature is 0, all completions of a prompt would be equal; raise it")
    if "mismatched_kl" in method.objective.needs and min(settings.batch, rows) < 2:
        raise PosttrainError(
            f"{name} judges an answer against other rows': it needs 2 rows a step; got batch {settings.batch} "
            f"and {rows} row{'s' if rows != 1 else ''} of data"
        )
    check_batch(name, settings, rows)
    if here().sharded and method.weight_rule is not None:
        raise PosttrainError(f"{name} masks whole weights, which are spread over processes; train without shard")
    if settings.patience and not settings.evaluate_every:
        raise PosttrainError(f"{name}: patience is {settings.patience} and nothing is evaluated; set evaluate_every")
    if settings.evaluate_every and not judged:
        raise PosttrainError(
            f"{name}: evaluate_every is {settings.evaluate_every} and nothing is held out; give a task, or heldout "
            f"with the data"
        )
    if method.precision is not None:
        linear_layers(policy)  # refuses a model that has none

    if settings.staleness:
        _check_ahead(method, source)


def _check_ahead(method: Method, source: Source) -> None:
    """Refuse what cannot learn from completions of older weights."""
    who = f"{method.name}: staleness is {method.settings.staleness}"
    if not method.online:
        raise PosttrainError(f"{who}; rows of a data set are not drawn ahead: set staleness: 0")
    if not isinstance(method.rollouts, Plain) or hasattr(source.sampler, "survey"):
        part = source.sampler if isinstance(method.rollouts, Plain) else method.rollouts
        raise PosttrainError(
            f"{who}; {type(part).__name__} looks at the present policy to draw, and cannot do it ahead: set "
            f"staleness: 0"
        )
    if not corrects(method.objective):
        raise PosttrainError(
            f"{who}; its objective weighs a completion alike whatever policy drew it, which is right for fresh "
            f"ones alone: take a method with a ratio, such as grpo, or set staleness: 0"
        )
