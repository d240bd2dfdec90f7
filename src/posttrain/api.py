"""The Python API: `train`, `evaluate`, `compare` and `quantize`, as short as a recipe."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posttrain.compress.calibrate import calibration_batches, text_of
from posttrain.compress.method import Calibrated, Compression
from posttrain.compress.policy import CompressedPolicy, check_float, compressed_copy
from posttrain.evaluation.evaluate import evaluate as evaluate_engine
from posttrain.evaluation.evaluation import Evaluation
from posttrain.evaluation.task import Task
from posttrain.evaluation.tasks import task_from
from posttrain.methods.fitting import fitted
from posttrain.methods.registry import find
from posttrain.models.causal import CausalPolicy
from posttrain.models.load import load
from posttrain.recipe import (
    DataSpec,
    EvaluateSpec,
    ModelSpec,
    Recipe,
    StageSpec,
    Where,
    check,
    checked,
    checked_settings,
    cluster_of,
    engine_choice,
)
from posttrain.recipe_values import Count, typed
from posttrain.reward.names import unknown
from posttrain.rollout.engine_choice import engine_for
from posttrain.run import Run, execute
from posttrain.terminal import Counter
from posttrain.training.method import Method, Pipeline, stages_of
from posttrain.training.scoring import sequence_scores
from posttrain.training.values import checked_seed
from posttrain.trajectory import PosttrainError

if TYPE_CHECKING:
    from posttrain.studies.comparison import Comparison


def train(
    model: str | Path | CausalPolicy,
    method: Method | Pipeline | str,
    task: Task | str | dict[str, Any] | None = None,
    *,
    data: Any = None,
    reward: Any = None,
    folder: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    budget: str | float | None = None,
    evaluate: dict[str, Any] | None = None,
    engine: str | dict[str, Any] | None = None,
    cluster: str | dict[str, Any] | None = None,
    show: bool = True,
    shard: bool | None = None,
    **settings: Any,
) -> Run:
    """Post-train a model and measure what it gained.

    Args:
        model: what `load` takes, or a loaded policy (trained in place).
        method: a method, several joined by `>>`, or a name.
        task: prompts, worked answers, reward and held-out problems: a `Task`, a name, or a mapping (see `task_from`).
        data: rows of your own for methods that learn from rows: a file, a hub id, a list of dicts, or a mapping with
            `source` and the options of `load_dataset`.
        reward: in place of the task's (see `reward_from`).
        folder: the run folder; a new one under `runs/` by default. resume: go on with the run in it.
        budget: longest time of each stage, in seconds or as text (`10m`).
        evaluate: `samples`, `holdout`, `max_tokens`, `temperature`, `k`, `before`.
        engine: what draws completions: `embedded`, `vllm`, `vllm-server`, the URL of a running vLLM server, or a
            mapping with `name` and the options of `EngineChoice`.
        cluster: workers that draw and score completions: the address of a Ray cluster (`local`, `auto`, ...), or a
            mapping with what `Cluster` takes.
        shard: of several processes that torchrun started: spread the weights over them (see `execute`).
        settings: any setting of `Settings`, for every stage (`steps=60, learning_rate=1e-5`).
    Returns:
        the run: `run.model`, `run.before`, `run.after`, `run.report`, `run.folder`.
    """
    if resume and folder is None:
        raise PosttrainError("train: resume needs the folder of the run to go on with")
    where = Where("train")
    if budget is not None:
        settings["budget"] = budget
    changed = checked_settings(settings, (), where)
    rows = None
    if data is not None:
        rows = checked(DataSpec, data if isinstance(data, Mapping) else {"source": _source(data)}, ("data",), where)
    stages = []
    for stage in stages_of(find(method).function() if isinstance(method, str) else method):
        # a task gives online stages their prompts, whatever rows the others learn from
        own = None if stage.online and task is not None else rows
        stages.append(StageSpec(stage.with_settings(**changed), own, reward if stage.online else None))
    if reward is not None and not any(stage.method.online for stage in stages):
        raise PosttrainError("train: a reward was given and no stage samples completions; give a method such as grpo")
    recipe = Recipe(
        _model_spec(model),
        tuple(stages),
        str(task) if isinstance(task, Path) else task,
        checked(EvaluateSpec, evaluate or {}, ("evaluate",), where),
        seed,
        engine=engine_choice(engine, where),
        cluster=cluster_of(cluster, where),
        where=where,
    )
    check(recipe)
    return execute(
        recipe,
        folder=Path(folder) if folder is not None else None,
        resume=resume,
        show=show,
        shard=shard,
        policy=model if isinstance(model, CausalPolicy) else None,
    )


def evaluate(
    model: str | Path | CausalPolicy,
    task: Task | str | dict[str, Any],
    *,
    samples: int = 1,
    holdout: int | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    k: tuple[int, ...] = (1,),
    seed: int = 0,
) -> Evaluation:
    """Measure a model on the held-out problems of a task (greedy with one sample a prompt).

    Args:
        samples: completions a prompt. holdout: take only the first problems. k: which pass@k to estimate.
    """
    policy = model if isinstance(model, CausalPolicy) else load(model)
    task = task_from(task)
    sampling = replace(task.sampling, temperature=0.0 if samples == 1 else 1.0)
    if max_tokens is not None:
        sampling = replace(sampling, max_tokens=max_tokens)
    if temperature is not None:
        sampling = replace(sampling, temperature=temperature)
    return evaluate_engine(
        engine_for(policy),
        policy.tokenizer,
        task,
        samples=samples,
        sampling=sampling,
        limit=holdout,
        ks=k,
        seed=seed,
        likelihood=lambda trajectories: sequence_scores(policy, trajectories),
    )


def compare(
    model: str | Path | CausalPolicy,
    task: Task | str | dict[str, Any],
    methods: Sequence[Method | Pipeline | str] | Mapping[str, Method | Pipeline | str],
    *,
    budget: str | float,
    seeds: int = 3,
    folder: str | Path | None = None,
    holdout: int | None = None,
    samples: int = 1,
    show: bool = True,
    **settings: Any,
) -> Comparison:
    """Train a model by each method with each seed at an equal budget, and compare them on held-out problems.

    A comparison that was stopped goes on with the job it was at; methods and seeds added later join what is there.

    Args:
        model: what `load` takes, or a loaded policy (copies of it are trained).
        methods: methods, several joined by `>>`, or names; as a mapping, by the names to show.
        budget: what each run may spend in training: a time (`20m`, or seconds), tokens trained on (`2Mtokens`) or
            completions sampled (`5000rollouts`).
        folder: where everything is kept; by default one under `runs/` that is the same for the same conditions.
        holdout: how many held-out problems. samples: completions of each (greedy with one).
        settings: any setting of `Settings`, for all methods. `steps` and `epochs` are a further limit when given here;
            otherwise the budget alone ends a run, whatever the method's own are.
    Returns:
        the comparison: `print` shows its table and sentence; `page` is an HTML page with the curves.
    """
    from posttrain.studies.budget import Budget
    from posttrain.studies.compare import compare as compare_methods

    limit = Budget.parse(budget)
    changed = checked_settings(settings, (), Where("compare"))
    if changed.get("epochs") is not None and "steps" not in changed:
        changed["steps"] = None
    named = {
        name: _changed(find(method).function() if isinstance(method, str) else method, changed)
        for name, method in _named(methods).items()
    }
    return compare_methods(
        model if isinstance(model, CausalPolicy) else load(model),
        task_from(task),
        named,
        limit,
        seeds=seeds,
        folder=Path(folder) if folder is not None else None,
        holdout=holdout,
        samples=samples,
        max_tokens=changed.get("max_tokens"),
        keep_length="steps" in changed or "epochs" in changed,
        show=show,
    )


def quantize(
    model: str | Path | CausalPolicy,
    method: Compression | str,
    calibration: Any = None,
    *,
    samples: int | None = None,
    length: int | None = None,
    skip: str | Sequence[str] = (),
    seed: int = 0,
    show: bool = True,
    **arguments: Any,
) -> CompressedPolicy:
    """Compress a model; the one that is given stays as it was.

    Args:
        model: what `load` takes, or a loaded policy.
        method: a method of the families quantization and sparsity, or its name.
        calibration: a file of text or of rows, a hub id, texts, or a task (a `Task`, a name or a mapping); by default
            problems that the lab makes.
        samples, length: windows of calibration text, and tokens of each, in place of the method's.
        skip: patterns of layers that stay as they are, or one: `*.down_proj`.
        seed: of the windows, and of everything random in the method.
        arguments: of the method, where it is given by name (`bits=3`). A group that is left out is the method's own or,
            where that does not divide the model's layers, the largest power of two that does, with a warning.
    Returns:
        the compressed model: `small.save(folder)` writes what `load` reads, `small.compression` says what was done.
    """
    from posttrain.studies.compression import texts_for

    made = _compression(method, arguments)
    where = Where("quantize")
    usual = made.calibration
    much = Calibrated(
        typed(Count, usual.samples if samples is None else samples, ("samples",), where),
        typed(Count, usual.length if length is None else length, ("length",), where),
    )
    skip = (skip,) if isinstance(skip, str) else typed(tuple[str, ...], skip, ("skip",), where)
    checked_seed(seed, "quantize: seed")
    source = None if calibration is None else text_of(calibration)
    policy = model if isinstance(model, CausalPolicy) else load(model)
    check_float(policy)
    if isinstance(method, str):
        made, said = fitted(made, arguments, policy.base, skip)
        if said is not None:
            warnings.warn(said, stacklevel=2)
    if source is None:
        batches = texts_for(policy).batches(policy, much, seed)
    else:
        batches = calibration_batches(policy, source, much.samples, much.length, seed)
    with Counter(f"{made.name}: blocks", "blocks", show=show) as progress:
        return compressed_copy(policy, made, batches, skip=skip, seed=seed, progress=progress)


def _compression(method: Compression | str, arguments: Mapping[str, Any]) -> Compression:
    """The method, made with its arguments where it is given by name."""
    entry = find(method) if isinstance(method, str) else None
    if not isinstance(method, Compression) and (entry is None or entry.kind != "compression"):
        name = method if isinstance(method, str) else getattr(method, "name", repr(method))
        raise PosttrainError(f"quantize: {name} does not compress; use train for it, or give a method such as gptq")
    if isinstance(method, Compression):
        if arguments:
            raise PosttrainError(
                f"quantize: {method.name} is made already; give {', '.join(arguments)} where it is made"
            )
        return method
    assert entry is not None
    for key in arguments:
        if key not in entry.parameters:
            raise unknown(f"argument of {entry.name}", key, entry.parameters)
    made: Compression = entry.function(**arguments)
    return made


def _named(
    methods: Sequence[Method | Pipeline | str] | Mapping[str, Method | Pipeline | str],
) -> dict[str, Method | Pipeline | str]:
    """Methods by the names to show."""
    if isinstance(methods, Mapping):
        return dict(methods)
    found: dict[str, Method | Pipeline | str] = {}
    for method in methods:
        name = method if isinstance(method, str) else " >> ".join(stage.name for stage in stages_of(method))
        if name in found:
            raise PosttrainError(f"compare: two methods are called {name}; give a mapping with names of your own")
        found[name] = method
    return found


def _changed(method: Method | Pipeline, settings: dict[str, Any]) -> Method | Pipeline:
    stages = tuple(stage.with_settings(**settings) for stage in stages_of(method))
    return Pipeline(stages) if isinstance(method, Pipeline) else stages[0]


def _source(data: Any) -> Any:
    return str(data) if isinstance(data, str | Path) else list(data)


def _model_spec(model: str | Path | CausalPolicy) -> ModelSpec:
    """A loaded model is loaded again in its own precision, should the run be resumed."""
    if not isinstance(model, CausalPolicy):
        return ModelSpec(id=str(model))
    if model.adapted:
        raise PosttrainError(f"{model.name} has an adapter already; merge it first (model.merged())")
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(model.dtype)
    if precision is None:
        raise PosttrainError(f"{model.name} is in {model.dtype}; training computes in bf16 or fp32: load it so")
    return ModelSpec.model_validate({"id": model.name, "precision": precision, "device": str(model.device)})
