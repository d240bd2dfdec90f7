"""`posttrain train`: methods on a model without a recipe file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.cli.inline import inline
from posttrain.cli.run import SHARD, command, finish

if TYPE_CHECKING:
    from posttrain.methods.registry import Entry
    from posttrain.recipe_text import Place

Given = dict[str, tuple[Any, str]]  # setting to its value and how it was written


def train(
    model: Annotated[str, typer.Argument(help="A bundled name, folder, GGUF file or hub id.", show_default=False)],
    methods: Annotated[
        list[str], typer.Argument(metavar="METHOD...", help="One method a stage, in order.", show_default=False)
    ],
    task: Annotated[
        str | None,
        typer.Option(help="A reasoning-gym name, a file, or YAML: '{reasoning_gym: chain_sum, terms: [2, 3]}'."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Rows for the stages that learn from rows: a file or a hub id.")
    ] = None,
    reward: Annotated[
        str | None, typer.Option(help="In place of the task's: a verifier, package.module:function, or YAML.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting of all stages that know it (group=4), of one (stages.1.group=4), or of the recipe "
            "(evaluate.samples=4).",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of each stage.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the rows of each stage.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows or prompts a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
    lora: Annotated[int | None, typer.Option(help="Rank of an adapter; 0 trains all weights.")] = None,
    budget: Annotated[str | None, typer.Option(help="Longest time of each stage: 90s, 10m, 1h.")] = None,
    holdout: Annotated[int | None, typer.Option(help="Held-out problems to evaluate on.")] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="What draws completions: embedded, vllm, vllm-server, the URL of a vLLM server, or YAML."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="Workers on a Ray cluster that draw completions: local, auto, HOST:PORT, or YAML."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The run folder (default: a new one under runs/).")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    shard: Annotated[bool, typer.Option("--shard", help=SHARD)] = False,
) -> None:
    """Train a model without a recipe file.

    Evaluates the model, trains it by one method after the other, evaluates it again and writes a report.
    Ctrl-C stops after the present step with a checkpoint, and says how to go on.
    """
    from posttrain.methods.registry import find
    from posttrain.recipe import parse_recipe
    from posttrain.recipe_text import Where, override
    from posttrain.run import execute

    given = given_settings(
        {"steps": steps, "epochs": epochs, "batch": batch, "learning_rate": learning_rate, "lora": lora,
         "budget": budget},
        [text for text in overrides or [] if "." not in text.partition("=")[0]],
    )  # fmt: skip
    entries = [find(name) for name in methods]
    refuse_compressions(entries)
    stages, places = stages_with(entries, given)
    _add_sources(entries, stages, data, inline("--reward", reward) if reward else None, with_task=task is not None)
    values: dict[str, Any] = {"model": model, "stages": stages, "seed": seed}
    if task is not None:
        values["task"] = inline("--task", task)
    if holdout is not None:
        values["evaluate"] = {"holdout": holdout}
        places["evaluate", "holdout"] = f"--holdout {holdout}"
    if engine is not None:
        values["engine"] = inline("--engine", engine)
        places["engine",] = f"--engine {engine}"
    if cluster is not None:
        values["cluster"] = inline("--cluster", cluster)
        places["cluster",] = f"--cluster {cluster}"
    dotted = [text for text in overrides or [] if "." in text.partition("=")[0]]
    recipe = parse_recipe(*override(values, dotted, Where("", {}, places)))
    finish(execute(recipe, folder=output, command=command(), shard=shard or None))


def refuse_compressions(entries: list[Entry]) -> None:
    """A method that compresses is for another command."""
    from posttrain.trajectory import PosttrainError

    for entry in entries:
        if entry.kind == "compression":
            command = "prune" if entry.family == "sparsity" else "quantize"
            raise PosttrainError(
                f"{entry.name} compresses and does not train; use posttrain {command}, or make it the last stage of a "
                f"recipe"
            )


def given_settings(shortcuts: dict[str, Any], assignments: list[str]) -> Given:
    """What was set, by shortcuts and by --set."""
    from posttrain.recipe_text import read_yaml
    from posttrain.trajectory import PosttrainError

    given: Given = {
        key: (value, f"--{key.replace('_', '-')} {value}") for key, value in shortcuts.items() if value is not None
    }
    for text in assignments:
        key, equals, written = text.partition("=")
        if not equals or not key:
            raise PosttrainError(f"--set {text}: expected KEY=VALUE, as in group=4")
        if key in given:
            raise PosttrainError(f"--set {text}: {key} is given twice ({given[key][1]})")
        given[key] = (read_yaml(written, f"--set {text}")[0], f"--set {text}")
    return given


def stages_with(entries: list[Entry], given: Given) -> tuple[list[dict[str, Any]], dict[Place, str]]:
    """The stages with their settings, and where each came from."""
    from posttrain.reward.names import unknown
    from posttrain.training.settings import NAMES

    known = [{*entry.parameters, *NAMES} for entry in entries]
    for key in given:
        if not any(key in names for names in known):
            raise unknown("setting", key, set().union(*known))
    stages = [
        {entry.name: {key: value for key, (value, _) in given.items() if key in names}}
        for entry, names in zip(entries, known, strict=True)
    ]
    places: dict[Place, str] = {
        ("stages", i, entry.name, key): text for i, entry in enumerate(entries) for key, (_, text) in given.items()
    }
    return stages, places


def _add_sources(
    entries: list[Entry], stages: list[dict[str, Any]], data: str | None, reward: Any, *, with_task: bool
) -> None:
    """Data for the stages that learn from rows (a task gives the others their prompts), the reward for the others."""
    from posttrain.trajectory import PosttrainError

    online = [[method.online for method in entry.stages] for entry in entries]  # one each, of a pipeline several
    for entry, stage, samples in zip(entries, stages, online, strict=True):
        if data is not None and not (all(samples) and with_task):
            stage[entry.name]["data"] = data
        if reward is not None and any(samples):
            stage[entry.name]["reward"] = reward
    if reward is not None and not any(map(any, online)):
        raise PosttrainError("--reward: no stage samples completions; give a method such as grpo, or leave it out")
    if data is not None and with_task and all(map(all, online)):
        raise PosttrainError(
            "--data: every stage samples completions on the task's prompts; leave out --data or --task"
        )
