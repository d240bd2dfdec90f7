"""The usual arm: a lab model trained by a method on its task, and measured on held-out problems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from posttrain.evaluation.evaluate import evaluate
from posttrain.evaluation.task import Task
from posttrain.lab.haste import STEPS, is_hasty
from posttrain.models.causal import CausalPolicy
from posttrain.rollout.engine_choice import engine_for
from posttrain.studies.study import Arm, Measured
from posttrain.training.method import Method, Pipeline, stages_of
from posttrain.training.stage import Measure, Trained, train_stage

QUICK_STEPS = 2
QUICK_PROMPTS = 8
LAB: dict[str, Any] = {
    "steps": 100, "batch": 16, "group": 8, "learning_rate": 3e-4, "schedule": "constant", "warmup": 0.0,
    "rollout_rows": 256, "token_budget": 8192, "max_tokens": 16,
}  # fmt: skip

Extra = Callable[[CausalPolicy, Task, Trained], dict[str, float]]


def trained(
    method: Method | Pipeline,
    *,
    preset: str = "tiers",
    samples: int = 8,
    ks: tuple[int, ...] = (1, 8),
    prompts: int = 192,
    every: int = 0,
    extra: Extra | None = None,
    task: Callable[[], Task] | None = None,
    depends: tuple[object, ...] = (),
) -> Arm:
    """An arm that trains the preset's model by `method` (whose settings hold the budget) and measures it.

    Figures: `accuracy` (mean of `samples` completions at temperature 1 on the first `prompts` held-out problems),
    `pass@k`, and both by domain where the problems have one (`accuracy/hard`, `pass@8/hard`); `greedy` (accuracy
    without sampling), `length` (tokens a completion), `entropy` (of the last quarter of training steps, nats), and what
    `extra` adds.

    Args:
        preset: the lab's model and task. task: a module-level function that makes another task for that model.
        every: measure the accuracy curve every so many steps (0: only before and after).
        extra: a module-level function of the trained policy, the task and the record of training.
    """
    from posttrain import lab

    arguments = {
        "method": method, "preset": preset, "model": lab.preset(preset).key, "samples": samples, "ks": ks,
        "prompts": prompts, "every": every, "extra": extra, "task": task,
    }  # fmt: skip
    return Arm(run_trained, arguments, depends)


def run_trained(
    seed: int,
    quick: bool,
    *,
    method: Method | Pipeline,
    preset: str,
    samples: int,
    ks: tuple[int, ...],
    prompts: int,
    every: int,
    extra: Extra | None,
    task: Callable[[], Task] | None,
    model: str = "",
) -> Measured:
    """See `trained`. The seed makes the order of prompts, the completions and the updates; the model, whose key in the
    lab is `model`, is the same for all."""
    from posttrain import lab

    policy = lab.model(preset)
    problems = lab.task(preset) if task is None else task()
    if quick:
        method, prompts = shortened(method), QUICK_PROMPTS

    def measure(policy: CausalPolicy) -> dict[str, float]:
        return {"accuracy": heldout_figures(policy, problems, samples=2, ks=(1,), prompts=prompts)["accuracy"]}

    result = train_stage(policy, method, problems, seed=seed, evaluate=measure if every else None, every=every)
    figures = heldout_figures(result.policy, problems, samples=samples, ks=ks, prompts=prompts)
    figures["greedy"] = heldout_figures(result.policy, problems, samples=1, ks=(1,), prompts=prompts)["accuracy"]
    late = [m["entropy"] for m in result.metrics[-max(1, len(result.metrics) // 4) :] if "entropy" in m]
    if late:
        figures["entropy"] = sum(late) / len(late)
    if extra is not None:
        figures |= extra(result.policy, problems, result)
    return Measured(figures, curves(result), result.rollouts, result.seconds, result.tokens)


def heldout_figures(
    policy: CausalPolicy, task: Task, *, samples: int, ks: tuple[int, ...], prompts: int, seed: int = 0
) -> dict[str, float]:
    """Accuracy and pass@k on the first held-out problems, over all and by `meta["domain"]`; mean length in tokens."""
    found = evaluate(
        engine_for(policy, rows=256), policy.tokenizer, task, samples=samples, limit=prompts, ks=ks, seed=seed
    )
    figures = {"accuracy": float(found.correct.mean()), "length": float(found.tokens.mean())}
    domains: dict[str, list[int]] = {}
    for i, item in enumerate(task.heldout[:prompts]):
        if "domain" in item.meta:
            domains.setdefault(str(item.meta["domain"]), []).append(i)
    for k in ks:
        if k > 1:
            figures[f"pass@{k}"] = pass_at(found.correct, k)
    for name, rows in sorted(domains.items()):
        figures[f"accuracy/{name}"] = float(found.correct[rows].mean())
        for k in ks:
            if k > 1:
                figures[f"pass@{k}/{name}"] = pass_at(found.correct[rows], k)
    return figures


def pass_at(correct: Any, k: int) -> float:
    """Mean unbiased pass@k of `[prompts, samples]` outcomes."""
    from posttrain.evaluation.statistics import pass_at_k

    return float(sum(pass_at_k(len(row), int(row.sum()), k) for row in correct) / len(correct))


def in_lab(method: Method | Pipeline, **settings: Any) -> Method | Pipeline:
    """The method with the settings of the lab's small models: 100 steps of 16 prompts, 8 completions each, at a
    constant rate of 3e-4 (1e-3 destroys them). Studies change what they must; a baseline with the same settings is the
    same arm, and run once. Where haste is asked for, which is only inside a quick job, that makes a model of its own
    before it trains it, the steps are few.
    """
    settings = {**LAB, **settings}
    if is_hasty():
        settings["steps"] = min(settings["steps"], STEPS)
    stages = [stage.with_settings(**settings) for stage in stages_of(method)]
    return Pipeline(tuple(stages)) if isinstance(method, Pipeline) else stages[0]


def shortened(method: Method | Pipeline) -> Method | Pipeline:
    """The smallest run of a method that still goes through every part of it."""
    short = [stage.with_settings(steps=QUICK_STEPS, epochs=None, warmup=0.0) for stage in stages_of(method)]
    return Pipeline(tuple(short)) if isinstance(method, Pipeline) else short[0]


def curves(result: Trained) -> dict[str, list[dict[str, float]]]:
    """What was measured during training, as a study's curves."""
    points = [
        {
            "step": p.step,
            "seconds": p.seconds,
            "tokens": p.tokens,
            "rollouts": p.rollouts,
            "value": p.figures["accuracy"],
        }
        for p in result.curve
    ]
    return {"accuracy": points} if points else {}


__all__ = ["Measure", "curves", "heldout_figures", "in_lab", "pass_at", "run_trained", "shortened", "trained"]
