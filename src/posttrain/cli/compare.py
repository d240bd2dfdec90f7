"""`posttrain compare`: any set of methods on a model and a task at an equal budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.cli.inline import inline

if TYPE_CHECKING:
    from posttrain.cli.train import Given
    from posttrain.evaluation.task import Task
    from posttrain.training.method import Method, Pipeline


LAB = "lab:"
SUMS = {"reasoning_gym": "chain_sum", "terms": [2, 3], "digits": [1, 2], "train": 2000, "heldout": 200}


def compare(
    methods: Annotated[
        str, typer.Option(metavar="A,B,...", help="Methods; A+B trains by one after the other.", show_default=False)
    ],
    budget: Annotated[
        str,
        typer.Option(
            metavar="TIME|TOKENS|ROLLOUTS",
            help="What each run may spend in training: 5m, 2Mtokens or 5000rollouts.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str, typer.Option(help="A bundled name, folder, GGUF file, hub id, or a model of the lab: lab:tiers.")
    ] = "smollm2-135m",
    task: Annotated[
        str | None,
        typer.Option(
            help="A reasoning-gym name, a file, or YAML: '{reasoning_gym: chain_sum, terms: [2, 3]}'. "
            "By default the demo's sums, or a lab model's own task.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each method.")] = 3,
    folder: Annotated[
        Path | None,
        typer.Option(help="Where everything is kept (default: one under runs/, the same for the same conditions)."),
    ] = None,
    holdout: Annotated[int | None, typer.Option(help="Held-out problems to judge by (default: all).")] = None,
    samples: Annotated[int, typer.Option(help="Completions of a held-out problem; greedy with one.")] = 1,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of all methods that know it: group=4."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Most optimizer steps of each stage, beside the budget.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Most passes over the rows of each stage.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows or prompts a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
    lora: Annotated[int | None, typer.Option(help="Rank of an adapter; 0 trains all weights.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Of a completion, in training and judging.")] = None,
) -> None:
    """Compare methods on a model and a task at an equal budget.

    Each method is trained several times from the same model and judged on the same held-out problems: a table with
    intervals, which differences are real, and a page with the learning curves. Stopped and started again, it goes on;
    methods and seeds added later join what is there.
    """
    from posttrain.cli.train import given_settings
    from posttrain.models.load import load
    from posttrain.studies.budget import Budget
    from posttrain.studies.compare import compare as compare_methods

    limit = Budget.parse(budget)
    given = given_settings(
        {"steps": steps, "epochs": epochs, "batch": batch, "learning_rate": learning_rate, "lora": lora,
         "max_tokens": max_tokens},
        overrides or [],
    )  # fmt: skip
    if model.startswith(LAB):
        _set_for_lab(given)
    made = _methods(methods, given)
    problems = _task(task, model)
    longest = given.get("max_tokens") if not model.startswith(LAB) else None
    found = compare_methods(
        load(model),
        problems,
        made,
        limit,
        seeds=seeds,
        folder=folder,
        holdout=holdout,
        samples=samples,
        max_tokens=longest[0] if longest is not None else None,
        keep_length="steps" in given or "epochs" in given,
    )
    print(found)
    print(f"page: {found.page}")


def _task(text: str | None, model: str) -> Task:
    """The task that was asked for; else a lab model's own, or the demo's."""
    from posttrain.evaluation.tasks import task_from

    if text is not None:
        return task_from(inline("--task", text))
    if model.startswith(LAB):
        from posttrain import lab

        return lab.task(model.removeprefix(LAB).partition("@")[0])
    return task_from(SUMS)


def _set_for_lab(given: Given) -> None:
    """The lab's small models learn with its own settings, where none were given."""
    from posttrain.studies.arms import LAB as SETTINGS

    for key, value in SETTINGS.items():
        if key != "steps" and key not in given:
            given[key] = (value, f"the lab's {key} {value}")


def _methods(text: str, given: Given) -> dict[str, Method | Pipeline]:
    """The methods by name, each with the settings that it knows."""
    from posttrain.cli.train import stages_with
    from posttrain.methods.registry import find
    from posttrain.recipe import stage_specs
    from posttrain.recipe_text import Where
    from posttrain.training.method import Pipeline
    from posttrain.trajectory import PosttrainError

    chains = [[find(name.strip()) for name in part.split("+")] for part in text.split(",") if part.strip()]
    if not chains:
        raise PosttrainError(f"--methods {text!r}: expected names such as grpo,riskpo")
    entries = list({entry.name: entry for chain in chains for entry in chain}.values())
    stages, places = stages_with(entries, given)
    where = Where("", {}, places)
    specs: dict[str, tuple[Any, ...]] = {
        entry.name: tuple(s.method for s in stage_specs(entry, stage[entry.name], ("stages", i, entry.name), where))
        for i, (entry, stage) in enumerate(zip(entries, stages, strict=True))
    }
    made: dict[str, Method | Pipeline] = {}
    for chain in chains:
        name = "+".join(entry.name for entry in chain)
        if name in made:
            raise PosttrainError(f"--methods: {name} is given twice")
        parts = [method for entry in chain for method in specs[entry.name]]
        made[name] = parts[0] if len(parts) == 1 else Pipeline(tuple(parts))
    return made
