"""`posttrain compare`: methods that train at an equal budget, or methods that compress on the same text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.cli.task_option import LAB, task_option

if TYPE_CHECKING:
    from posttrain.cli.train import Given
    from posttrain.evaluation.task import Task
    from posttrain.methods.registry import Entry
    from posttrain.training.method import Method, Pipeline

SUMS = {"reasoning_gym": "chain_sum", "terms": [2, 3], "digits": [1, 2], "train": 2000, "heldout": 200}


def compare(
    methods: Annotated[
        str,
        typer.Option(
            metavar="A,B,...",
            help="Methods that train, where A+B trains by one after the other; or methods that compress.",
            show_default=False,
        ),
    ],
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="TIME|TOKENS|ROLLOUTS",
            help="What each run may spend in training: 5m, 2Mtokens or 5000rollouts.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="A bundled name, folder, GGUF file, hub id, or a model of the lab: lab:tiers.")
    ] = "smollm2-135m",
    task: Annotated[
        str | None,
        typer.Option(
            help="A reasoning-gym name, a file, or YAML: '{reasoning_gym: chain_sum, terms: [2, 3]}'. "
            "By default a lab model's own task, else the demo's sums for methods that train.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each method; of compressions, draws of calibration text.")] = 3,
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
    bits: Annotated[
        str | None,
        typer.Option(metavar="B,B...", help="Of compressions: each method at each of these.", show_default=False),
    ] = None,
    group: Annotated[
        int | None,
        typer.Option(help="Of methods that train: completions a prompt. Of compressions: weights that share a scale."),
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="FILE|TASK", help="Of compressions: see posttrain quantize.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(metavar="FILE|TASK", help="Of compressions: what perplexity is measured on.")
    ] = None,
    windows: Annotated[int | None, typer.Option(help="Of compressions: windows of calibration text (64).")] = None,
    length: Annotated[int | None, typer.Option(help="Of compressions: tokens of a window (512).")] = None,
    skip: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Of compressions: layers that all leave as they are.")
    ] = None,
) -> None:
    """Compare methods that train, or methods that compress.

    Those that train have an equal budget, those that compress are calibrated and measured on the same text. Each is run
    several times from the same model and judged on the same held-out problems or text: a table with intervals, which
    differences are real, and a page with the learning curves, or with perplexity against stored bits. Stopped and
    started again, it goes on; methods and seeds added later join what is there.
    """
    trains = {
        "budget": budget, "samples": None if samples == 1 else samples, "steps": steps, "epochs": epochs,
        "batch": batch, "learning-rate": learning_rate, "lora": lora, "max-tokens": max_tokens,
    }  # fmt: skip
    compresses = {
        "bits": bits, "calibration": calibration, "text": text, "windows": windows, "length": length, "skip": skip,
    }  # fmt: skip
    compressions = _compressions(methods)
    _refuse(compresses if not compressions else trains, bool(compressions))
    if compressions:
        from posttrain.cli.compare_compressed import compare_compressed

        compare_compressed(
            compressions, model=model, task=task, bits=bits, group=group, overrides=overrides or [],
            calibration=calibration, text=text, windows=windows, length=length, skip=tuple(skip or ()), seeds=seeds,
            folder=folder, holdout=holdout,
        )  # fmt: skip
        return
    from posttrain.cli.train import given_settings
    from posttrain.models.load import load
    from posttrain.studies.budget import Budget
    from posttrain.studies.compare import compare as compare_methods

    limit = Budget.parse(_needed(budget))
    given = given_settings(
        {"steps": steps, "epochs": epochs, "batch": batch, "learning_rate": learning_rate, "lora": lora,
         "max_tokens": max_tokens, "group": group},
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


def _compressions(text: str) -> list[Entry]:
    """The methods, where all of them compress; none where all of them train. Both kinds together are refused."""
    from posttrain.methods.registry import find
    from posttrain.trajectory import PosttrainError

    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise PosttrainError(f"--methods {text!r}: expected names such as grpo,riskpo or gptq,awq")
    entries = [[find(name.strip()) for name in part.split("+")] for part in parts]
    kinds = {entry.name: entry.kind == "compression" for chain in entries for entry in chain}
    if not any(kinds.values()):
        return []
    if not all(kinds.values()):
        packs, trains = (next(name for name, kind in kinds.items() if kind is wanted) for wanted in (True, False))
        raise PosttrainError(f"--methods: {packs} compresses and {trains} trains; compare one kind at a time")
    if joined := next((part for part in parts if "+" in part), None):
        raise PosttrainError(f"--methods {joined}: compressions cannot be joined; give them as A,B")
    found = [entry for chain in entries for entry in chain]
    if len(kinds) < len(found):
        twice = next(entry.name for entry in found if [e.name for e in found].count(entry.name) > 1)
        raise PosttrainError(f"--methods: {twice} is given twice")
    return found


def _refuse(options: dict[str, Any], compressing: bool) -> None:
    """Options of the other kind of comparison are a mistake, not to be passed over."""
    from posttrain.trajectory import PosttrainError

    for name, value in options.items():
        if value not in (None, []):
            kind, other = ("compress", "train") if compressing else ("train", "compress")
            raise PosttrainError(f"--{name} is for methods that {other}; these {kind}: leave it out")


def _needed(budget: str | None) -> str:
    from posttrain.trajectory import PosttrainError

    if budget is None:
        raise PosttrainError(
            "--budget is missing: what each run may spend in training, such as 5m, 2Mtokens or 5000rollouts"
        )
    return budget


def _task(text: str | None, model: str) -> Task:
    """The task that was asked for; else a lab model's own, or the demo's."""
    from posttrain.evaluation.tasks import task_from

    return task_option(text, model) or task_from(SUMS)


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
