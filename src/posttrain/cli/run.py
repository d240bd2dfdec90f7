"""`posttrain run`: carry out a recipe, or go on with a run."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from posttrain.run import Run


SHARD = "Of several processes (torchrun, accelerate launch): spread the weights over them (FSDP2)."


def run(
    recipe: Annotated[Path | None, typer.Argument(help="The recipe, a YAML file.", show_default=False)] = None,
    output: Annotated[
        Path | None, typer.Option(help="The run folder (default: the recipe's output, else a new one under runs/).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="In place of the recipe's seed.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A value in place of the recipe's: stages.0.epochs=3."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Go on with the run in this folder; no recipe needed.")
    ] = None,
    shard: Annotated[bool, typer.Option("--shard", help=SHARD)] = False,
) -> None:
    """Carry out a recipe.

    Evaluates the model, trains it stage by stage, evaluates it again and writes a report, all in the run folder.
    Ctrl-C stops after the present step with a checkpoint, and says how to go on.
    """
    from posttrain.recipe import load_recipe
    from posttrain.run import execute, resume_run
    from posttrain.trajectory import PosttrainError

    changes = [*(overrides or []), *([f"seed={seed}"] if seed is not None else [])]
    if resume is not None:
        if recipe is not None or changes or output is not None:
            raise PosttrainError(
                "--resume goes on with a run as it was started: give it the run folder and nothing else"
            )
        finish(resume_run(resume, shard=shard or None))
    elif recipe is None:
        raise PosttrainError("no recipe given: expected posttrain run RECIPE.yaml, or posttrain run --resume DIR")
    else:
        finish(execute(load_recipe(recipe, changes), folder=output, command=command(), shard=shard or None))


def command() -> str:
    """The command line as it was typed, for the record in the run folder."""
    return shlex.join(["posttrain", *sys.argv[1:]])


def finish(done: Run) -> None:
    """Where the results are, and as the last line the result itself; of several processes the first says it."""
    from posttrain.processes import here

    if not here().main:
        return
    print(f"report: {done.report}")
    print(f"model: {done.folder / 'model'}")
    print(done.summary())
