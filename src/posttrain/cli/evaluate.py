"""`posttrain evaluate`: a model on the held-out problems of a task, and beside another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from posttrain.cli.inline import inline

if TYPE_CHECKING:
    from posttrain.evaluation.evaluation import Evaluation
    from posttrain.evaluation.statistics import Paired
    from posttrain.evaluation.task import Task


def evaluate(
    model: Annotated[str, typer.Argument(help="A bundled name, folder, GGUF file or hub id.", show_default=False)],
    task: Annotated[
        str,
        typer.Option(
            help="A reasoning-gym name, a file, or YAML: '{reasoning_gym: chain_sum, terms: [2, 3]}'.",
            show_default=False,
        ),
    ],
    samples: Annotated[int, typer.Option(help="Completions a problem; greedy with one.")] = 1,
    holdout: Annotated[int | None, typer.Option(help="Only the first problems.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Of a completion (default: the task's).")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of sampling (default: 0 with one sample, else 1).")] = None,
    k: Annotated[str, typer.Option(metavar="K,K...", help="Which pass@k to estimate: 1,4.")] = "1",
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    output: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write everything found to a file.")] = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL|FILE.json", help="Compare with another model, or with a file written.")
    ] = None,
    decoding: Annotated[
        list[str] | None,
        typer.Option(
            metavar="AXIS=V,V...",
            help="How the accuracy takes to decoding: values of temperature, top_k, top_p, min_p or max_tokens, e.g. "
            "temperature=0.3,0.7,1; take several samples.",
            show_default=False,
        ),
    ] = None,
    page: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Of --decoding: write heat maps and curves as a page.")
    ] = None,
) -> None:
    """Measure a model on the held-out problems of a task.

    With --decoding it is decoded in many ways, with the same random numbers, and beside another model (the float one of
    a quantized one, say) also compared by the distance of their next-token distributions.
    """
    from posttrain.evaluation.evaluation import compare
    from posttrain.evaluation.tasks import task_from
    from posttrain.training.values import checked_seed
    from posttrain.trajectory import PosttrainError

    checked_seed(seed, "--seed")
    if decoding:
        from posttrain.cli.decoding import evaluate_decoding

        if k != "1":
            raise PosttrainError(f"--k {k}: pass@k is not measured along --decoding; leave one of them out")
        evaluate_decoding(
            model, task_from(inline("--task", task)), decoding, against=against, samples=samples, holdout=holdout,
            max_tokens=max_tokens, temperature=temperature, seed=seed, output=output, page=page,
        )  # fmt: skip
        return
    if page is not None:
        raise PosttrainError(f"--page {page} is of --decoding; give that too, or leave it out")

    measure = _Measure(task_from(inline("--task", task)), samples, holdout, max_tokens, temperature, _ks(k), seed)
    written = _read(Path(against)) if against is not None and against.endswith(".json") else None
    found = measure(model)
    print(found.summary() if against is None else f"{model}: {found.summary()}", flush=True)
    if output is not None:
        _write(output, found)
    if against is not None:
        other = written or measure(against)
        print(f"{against}: {other.summary()}")
        print(in_words(model, against, compare(other, found), found.level))


def in_words(model: str, other: str, paired: Paired, level: float) -> str:
    """What a comparison says: how much better `model` is than `other`, or that nothing is clear."""
    points = 100 * paired.difference
    interval = f"{100 * level:g}% interval {100 * paired.low:+.1f} to {100 * paired.high:+.1f}"
    evidence = f"{interval}, p = {paired.pvalue:.3g} ({paired.test}, n={paired.n})"
    if paired.pvalue >= 1 - level:
        return f"no clear difference: {model} minus {other} is {points:+.1f} points, {evidence}"
    word = "better" if points > 0 else "worse"
    return f"{model} is {word} than {other} by {abs(points):.1f} points: {evidence}"


@dataclass(frozen=True)
class _Measure:
    """One way to evaluate, for one model or two."""

    task: Task
    samples: int
    limit: int | None
    max_tokens: int | None
    temperature: float | None
    ks: tuple[int, ...]
    seed: int

    def __call__(self, model: str) -> Evaluation:
        from posttrain.evaluation.evaluate import evaluate
        from posttrain.models.load import load
        from posttrain.rollout.engine_choice import engine_for
        from posttrain.terminal import Counter
        from posttrain.training.scoring import sequence_scores

        sampling, temperature = self.task.sampling, self.temperature
        if temperature is None:
            temperature = 0.0 if self.samples == 1 else sampling.temperature or 1.0
        max_tokens = sampling.max_tokens if self.max_tokens is None else self.max_tokens
        sampling = replace(sampling, temperature=temperature, max_tokens=max_tokens)
        policy = load(model)
        with Counter(f"evaluating {model}") as progress:
            return evaluate(
                engine_for(policy),
                policy.tokenizer,
                self.task,
                samples=self.samples,
                sampling=sampling,
                limit=self.limit,
                ks=self.ks,
                seed=self.seed,
                progress=progress,
                likelihood=lambda trajectories: sequence_scores(policy, trajectories),
            )


def _ks(text: str) -> tuple[int, ...]:
    from posttrain.trajectory import PosttrainError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise PosttrainError(f"--k {text}: expected whole numbers, as in 1,4") from None


def _read(file: Path) -> Evaluation:
    from posttrain.evaluation.evaluation import Evaluation
    from posttrain.trajectory import PosttrainError

    try:
        return Evaluation.from_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PosttrainError(f"--against {file}: cannot be read: {error}") from None
    except PosttrainError as error:
        raise PosttrainError(f"--against {file}: {error}; give what posttrain evaluate --output wrote") from None


def _write(file: Path, found: Evaluation) -> None:
    from posttrain.training.checkpoint import write_text
    from posttrain.trajectory import PosttrainError

    try:
        if file.exists() and not file.is_file():  # a pipe or a device
            file.write_text(found.to_json(), encoding="utf-8")
        else:
            write_text(file, found.to_json())  # whole or not at all: what was there stays if the disk is full
    except OSError as error:
        raise PosttrainError(f"--output {file}: cannot be written: {error.strerror or error}") from error
