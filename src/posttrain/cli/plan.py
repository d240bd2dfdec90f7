"""`posttrain plan`: what a method needs on a device, and how rollouts and training overlap on many."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from posttrain.plan.device import Device
    from posttrain.plan.planner import Plan
    from posttrain.plan.rehearsal import Lengths
    from posttrain.training.method import Method

ONLINE_PROMPT, OFFLINE_LENGTH = 128, 512  # tokens, where nothing is said


def plan(
    model: Annotated[
        str | None, typer.Option(help="A bundled name, folder, config.json, GGUF file or hub id.", show_default=False)
    ] = None,
    method: Annotated[str | None, typer.Option(help="The method's name.", show_default=False)] = None,
    gpus: Annotated[int | None, typer.Option(help="How many GPUs share a step.", show_default=False)] = None,
    gpu: Annotated[str, typer.Option(help="Which: a100, h100, h200, b200, l40s, rtx4090.")] = "h100",
    gpu_memory: Annotated[
        str | None, typer.Option(help="Of each GPU, in place of the model's own: 80GiB.", show_default=False)
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="On this machine's CPU.")] = False,
    memory: Annotated[str | None, typer.Option(help="In place of this machine's: 16GiB.", show_default=False)] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a sequence, prompt and completion, the longest.", show_default=False)
    ] = None,
    prompt: Annotated[int | None, typer.Option(help="Tokens of its prompt.", show_default=False)] = None,
    batch: Annotated[int | None, typer.Option(help="Rows or prompts a step.")] = None,
    lora: Annotated[int | None, typer.Option(help="Rank of an adapter; 0 trains all weights.")] = None,
    precision: Annotated[str, typer.Option(help="bf16, fp32, or auto: as training would choose.")] = "auto",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting or argument: group=16.")
    ] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Simulate rollout workers beside a trainer instead.")
    ] = False,
    times: Annotated[
        Path | None,
        typer.Option(metavar="RUN|FILE", help="Measured times: a run folder or a JSON file.", show_default=False),
    ] = None,
    workers: Annotated[str, typer.Option(metavar="N,N...", help="Numbers of rollout workers.")] = (
        "1,2,4,8,16,32,64,128,256,512,1024,2048,4096"
    ),
    staleness: Annotated[str, typer.Option(metavar="K,K...", help="Most updates behind (0: no overlap).")] = "0,1,2,4",
    spread: Annotated[
        str, typer.Option(metavar="S,S...", help="Standard deviation of completion lengths over their mean.")
    ] = "0,0.5,1",
    update_seconds: Annotated[float | None, typer.Option(help="Of a training step.")] = None,
    token_seconds: Annotated[float | None, typer.Option(help="Of a token of one completion, on a full worker.")] = None,
    tokens: Annotated[float | None, typer.Option(help="Mean length of a completion.")] = None,
    longest: Annotated[float | None, typer.Option(help="Tokens at which completions are cut off.")] = None,
    completions: Annotated[int | None, typer.Option(help="Of a training step.")] = None,
    slots: Annotated[int | None, typer.Option(help="Completions that a worker decodes at once.")] = None,
    sync_seconds: Annotated[float | None, typer.Option(help="Until workers have new weights.")] = None,
    gpus_per_worker: Annotated[int, typer.Option(help="For the count of GPUs in the table.")] = 1,
    trainer_gpus: Annotated[int, typer.Option(help="Likewise; 0 leaves GPUs uncounted.")] = 0,
    steps: Annotated[int, typer.Option(help="Steps to simulate.")] = 40,
    seed: Annotated[int, typer.Option(help="Of the simulated lengths.")] = 0,
    page: Annotated[Path | None, typer.Option(help="Where the plots go, an HTML file.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    """Predict the memory and time of a training step.

    Names the setting that fits. Needs no weights: the step is rehearsed on the model's configuration. With --simulate:
    throughput against the number of rollout workers, the staleness bound and the spread of completion lengths, from
    measured times.
    """
    from posttrain.training.values import checked_seed

    checked_seed(seed, "--seed")
    if simulate:
        told = {
            "update_seconds": update_seconds, "token_seconds": token_seconds, "tokens": tokens,
            "completions": completions, "slots": slots, "sync_seconds": sync_seconds,
        }  # fmt: skip
        _simulate(
            times, told, _numbers("--workers", workers, int), _numbers("--staleness", staleness, int),
            _numbers("--spread", spread, float), longest, gpus_per_worker, trainer_gpus, steps, seed, page, as_json,
        )  # fmt: skip
        return
    import json

    from posttrain.trajectory import PosttrainError

    if model is None or method is None:
        raise PosttrainError("give --model and --method, as in posttrain plan --model smollm2-135m --method grpo --cpu")
    if times is not None or page is not None:
        raise PosttrainError(f"--{'times' if times else 'page'} is for simulations; add --simulate, or leave it out")
    made = _plan(
        model, method, gpus, gpu, gpu_memory, cpu, memory, length, prompt,
        {"batch": batch, "lora": lora}, overrides or [], precision,
    )  # fmt: skip
    if as_json:
        print(json.dumps(made.json(), indent=2))
        return
    from posttrain.cli.table import print_table

    print_table(("part", "needs", "what"), made.rows())
    print(made.sentence())


def _plan(
    model: str, name: str, gpus: int | None, gpu: str, gpu_memory: str | None, cpu: bool, memory: str | None,
    length: int | None, prompt: int | None, shortcuts: dict[str, Any], overrides: list[str], precision: str,
) -> Plan:  # fmt: skip
    import torch

    from posttrain.models.load import DTYPES, best_dtype
    from posttrain.plan.outline import read_config
    from posttrain.plan.planner import Planner
    from posttrain.trajectory import PosttrainError

    if cpu and (gpus is not None or gpu_memory is not None):
        raise PosttrainError("--cpu and --gpus exclude each other; give one of them")
    if memory is not None and gpus is not None:
        raise PosttrainError("--memory is the CPU's; give --gpu-memory for a GPU's")
    if gpus is not None and gpus < 1:
        raise PosttrainError(f"--gpus is {gpus}; expected at least 1")
    if precision != "auto" and precision not in DTYPES:
        raise PosttrainError(f"--precision {precision!r} is unknown; expected auto, bf16 or fp32")
    on_cpu = cpu or (gpus is None and gpu_memory is None)
    made = _method(name, shortcuts, overrides)
    lengths = _lengths(made, length, prompt)
    config = read_config(model)
    device = _device(on_cpu, gpu, gpu_memory, memory)
    own = best_dtype(torch.device("cpu")) if on_cpu else torch.bfloat16
    dtype = own if precision == "auto" else DTYPES[precision]
    return Planner(config, made, lengths, device, dtype, gpus=gpus or 1, name=model).plan()


def _device(cpu: bool, gpu: str, gpu_memory: str | None, memory: str | None) -> Device:
    from dataclasses import replace

    from posttrain.plan.device import GPUS, parse_bytes, this_machine
    from posttrain.reward.names import unknown

    if cpu:
        return this_machine(None if memory is None else parse_bytes(memory))
    if gpu.lower() not in GPUS:
        raise unknown("GPU", gpu, GPUS)
    found = GPUS[gpu.lower()]
    return found if gpu_memory is None else replace(found, memory=parse_bytes(gpu_memory))


def _method(name: str, shortcuts: dict[str, Any], overrides: list[str]) -> Method:
    """The method with what was set, checked as a recipe's stage is."""
    from posttrain.cli.train import given_settings, refuse_compressions, stages_with
    from posttrain.methods.registry import find
    from posttrain.recipe import stage_specs
    from posttrain.recipe_text import Where
    from posttrain.trajectory import PosttrainError

    entry = find(name)
    refuse_compressions([entry])
    stages, places = stages_with([entry], given_settings(shortcuts, overrides))
    specs = stage_specs(entry, stages[0][entry.name], ("stages", 0, entry.name), Where("", {}, places))
    if len(specs) > 1:
        names = ", ".join(spec.method.name for spec in specs)
        raise PosttrainError(f"{entry.name} has {len(specs)} stages ({names}); plan them one at a time")
    return specs[0].method


def _lengths(method: Method, length: int | None, prompt: int | None) -> Lengths:
    """Tokens of prompt and completion, the rest by what the method samples or by half."""
    from posttrain.plan.rehearsal import Lengths
    from posttrain.trajectory import PosttrainError

    if method.online:
        completion = method.settings.max_tokens
        prompt = prompt if prompt is not None else ONLINE_PROMPT if length is None else length - completion
        if prompt < 1 or (length is not None and prompt + completion != length):
            raise PosttrainError(
                f"a prompt of {prompt} tokens and max_tokens {completion} do not make --length {length}; expected "
                f"their sum: change --length, --prompt or --set max_tokens"
            )
        return Lengths(prompt, completion)
    length = OFFLINE_LENGTH if length is None else length
    prompt = length // 2 if prompt is None else prompt
    if not 0 < prompt < length:
        raise PosttrainError(f"--prompt {prompt} and --length {length}: expected a prompt shorter than the sequence")
    return Lengths(prompt, length - prompt)


def _simulate(
    source: Path | None, given: dict[str, Any], workers: list[int], staleness: list[int], spreads: list[float],
    longest: float | None, gpus_each: int, trainer_gpus: int, steps: int, seed: int, page: Path | None, as_json: bool,
) -> None:  # fmt: skip
    import json
    from dataclasses import asdict

    from posttrain.cli.table import print_table
    from posttrain.plan import overlap_page
    from posttrain.plan.measured import completions, read_times, service
    from posttrain.plan.overlap import sweep
    from posttrain.terminal import Counter

    told = (read_times(source) if source is not None else {}) | {k: v for k, v in given.items() if v is not None}
    times, lengths = service(told), completions(told, longest=longest)
    with Counter("simulating", "clusters") as progress:
        curves = sweep(times, lengths, workers, staleness, spreads, steps=steps, seed=seed, progress=progress)
    if as_json:
        print(json.dumps({"times": asdict(times), "curves": [_curve_json(c) for c in curves]}, indent=2))
    else:
        print_table(overlap_page.HEADINGS, overlap_page.rows(curves, gpus_each, trainer_gpus))
        print(overlap_page.sentence(curves, times))
    if page is not None:
        written = overlap_page.write(page, curves, times, lengths, steps, gpus_each, trainer_gpus)
        if not as_json:
            print(f"page: {written}")


def _curve_json(curve: Any) -> dict[str, Any]:
    return {
        "staleness": curve.staleness,
        "spread": curve.spread,
        "saturates": curve.saturates,
        "share_of_training_bound": curve.share,
        "points": [
            {
                "workers": p.workers, "completions_per_second": p.outcome.throughput, "step_seconds": p.outcome.step,
                "trainer_busy": p.outcome.trainer, "workers_busy": p.outcome.rollout,
                "mean_staleness": p.outcome.staleness, "most_staleness": p.outcome.stalest,
            }
            for p in curve.points
        ],
    }  # fmt: skip


def _numbers(option: str, text: str, kind: type[Any]) -> list[Any]:
    """`1,2,4` as a list of numbers."""
    from posttrain.trajectory import PosttrainError

    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    low = 1 if option == "--workers" else 0
    if not found or not all(low <= n < float("inf") for n in found):
        raise PosttrainError(f"{option} {text!r}: expected numbers from {low}, separated by commas")
    return found
