"""On one GPU beside TRL and `transformers.generate`, in turn in one process; `python -m benchmarks.gpu`.

A model in the shape of Qwen2.5-1.5B with random weights in bf16: a step of SFT, DPO and GRPO, generation, and Triton's
kernels of packed weights beside torch's product. Everything has its ratio with the spread over the repetitions, the
peak of the device's memory, and its share of the ceilings that were measured in the same run. The file is written anew
after every case, so that a run that is cut off has kept what it found.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_machine import BF16, about, ceilings, kernels
from benchmarks.gpu_sides import Measured, arms, fresh, generation, ours, that_fits, trl
from benchmarks.gpu_work import SIZES, Work
from benchmarks.roofline import Size, forward_work, step_work
from benchmarks.run import rounded

ROOT = Path(__file__).resolve().parent.parent
CASES = ("kernels", "generation", "sft", "grpo", "dpo")
# passes: forward passes that a step is worth (training 3, a reference 1, sampling 1); warm-up and timed steps of a turn
PASSES = {"sft": 3, "dpo": 4, "grpo": 4}
STEPS = {"sft": (1, 3), "dpo": (1, 2), "grpo": (1, 1)}
SHARES = {"ceilings": 3, "kernels": 8, "generation": 20, "sft": 18, "grpo": 34, "dpo": 17}  # of the time there is
STREAMED = 512 << 20  # bytes of copies that the kernels go through: ten times an H100's cache


class Run:
    """The document that is written, and the time that is left."""

    def __init__(self, options: argparse.Namespace, work: Work) -> None:
        self.work, self.file, self.repetitions = work, options.json, options.repetitions
        self.begun, self.limit = time.perf_counter(), options.seconds
        self.document: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": about(work.device),
            "settings": {
                "model": work.load.model, "dtype": str(work.dtype).removeprefix("torch."), "rows": work.load.rows,
                "pairs": work.load.pairs, "prompts": work.load.prompts, "group": work.load.group,
                "tokens": work.load.tokens, "token_budget": work.load.budget, "repetitions": options.repetitions,
            },
            "cases": {},
        }  # fmt: skip

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.begun

    def enough(self, done: int, wanted: int, share: float = 1.0) -> bool:
        """Whether a case has had its repetitions, or, once it has one, its time."""
        return done >= wanted or (done > 0 and self.spent > share * self.limit)

    def keep(self, name: str, found: Any) -> None:
        self.document["cases"][name] = found
        self.document["seconds"] = self.spent
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(rounded(self.document), indent=1) + "\n", encoding="utf-8")

    def say(self, text: str) -> None:
        print(f"{self.spent:6.1f} s  {text}", flush=True)


def spread(values: Sequence[float]) -> list[float]:
    """Median, least and most."""
    return [statistics.median(values), min(values), max(values)]


def size_of(work: Work) -> Size:
    shape = work.load.model
    width, heads = shape["hidden_size"], shape["num_attention_heads"]
    keys = shape["num_key_value_heads"] * (width // heads)
    layer = 2 * width * width + 2 * width * keys + 3 * width * shape["intermediate_size"]
    layers = shape["num_hidden_layers"]
    return Size(layers * layer, shape["vocab_size"], width, layers, heads, width // heads)


def training(run: Run, kind: str, share: float) -> dict[str, Any]:
    """A kind of step by both sides in turn."""
    warmup, steps = STEPS[kind]
    sides: dict[str, list[Measured]] = {"ours": [], "trl": []}
    tried, budgets = arms(kind, run.work), [run.work.load.budget >> i for i in range(4)]
    while not run.enough(len(sides["trl"]), run.repetitions, share):
        sides["ours"].append(that_fits(lambda budget: ours(kind, run.work, warmup, steps, budget), budgets))
        sides["trl"].append(that_fits(lambda arm: trl(kind, run.work, warmup, steps, arm), tried))
        for side, each in sides.items():
            last = each[-1]
            run.say(f"{kind}: {side} {statistics.mean(last.seconds):.3f} s a step ({last.about['arm']})")
        run.keep(kind, steps_of(run, kind, sides))
    return steps_of(run, kind, sides)


def steps_of(run: Run, kind: str, sides: dict[str, list[Measured]]) -> dict[str, Any]:
    """The figures of training steps: seconds, tokens a second, ratios, memory, shares of the matrix throughput."""
    size, flops = size_of(run.work), run.document["cases"].get("ceilings", {}).get("flops")
    found: dict[str, Any] = {}
    for side, each in sides.items():
        rates, shares = [], []
        for measured in each:
            seconds = sum(measured.seconds)
            rates.append(sum(p * len(c) + sum(c) for step in measured.groups for p, c in step) / seconds)
            work = sum(step_work(size, step, PASSES[kind]) for step in measured.groups)
            shares.append(work / seconds / flops if flops else float("nan"))
        found[side] = {
            "seconds": [m.seconds for m in each], "tokens_per_second": spread(rates), "utilisation": spread(shares),
            "peak_mib": max(m.peak_mib for m in each), "about": [m.about for m in each],
            "tokens": [sum(p * len(c) + sum(c) for p, c in m.groups[0]) for m in each],
        }  # fmt: skip
    rate = {
        side: [sum(p * len(c) + sum(c) for step in m.groups for p, c in step) / sum(m.seconds) for m in each]
        for side, each in sides.items()
    }
    found["ratio"] = spread([a / b for a, b in zip(rate["ours"], rate["trl"], strict=True)])
    losses = [sides[side][0].about["loss"] for side in ("ours", "trl")]
    found["same_work"] = kind == "grpo" or sides["ours"][0].groups == sides["trl"][0].groups
    found["first_losses"] = losses
    return found


def generating(run: Run, share: float) -> dict[str, Any]:
    """Completions by both sides in turn, for every number of them."""
    found: dict[str, Any] = {}
    size, ceiling = size_of(run.work), run.document["cases"].get("ceilings", {})
    for prompts, samples in run.work.load.loads:
        calls = generation(run.work, prompts, samples)
        sides: dict[str, list[Measured]] = {side: [] for side in calls}
        calls["ours"]()  # which takes what is made once: kernels, graphs
        while not run.enough(len(sides["ours"]), run.repetitions, share):
            for side, call in calls.items():
                sides[side].append(call())
            said = ", ".join(f"{side} {each[-1].seconds[0]:.2f} s" for side, each in sides.items())
            run.say(f"{prompts * samples} completions: {said}")
        rates = {
            side: [sum(c for _, row in m.groups[0] for c in row) / m.seconds[0] for m in each]
            for side, each in sides.items()
        }
        steps = run.work.load.tokens
        read = 2 * (size.body + size.vocabulary * size.width) * steps
        floor = (
            max(read / ceiling["bytes"], forward_work(size, sides["ours"][0].groups[0]) / ceiling["flops"])
            if ceiling
            else float("nan")
        )
        found[f"{prompts} x {samples}"] = {
            "ratio": spread([a / b for a, b in zip(rates["ours"], rates["transformers"], strict=True)]),
            **{
                side: {
                    "seconds": [m.seconds[0] for m in each], "tokens_per_second": spread(rates[side]),
                    "peak_mib": max(m.peak_mib for m in each),
                    "times_the_floor": statistics.median(m.seconds[0] for m in each) / floor,
                }
                for side, each in sides.items()
            },
        }  # fmt: skip
        run.keep("generation", found)
        del calls
        fresh(run.work.device)
    return found


def products(run: Run, share: float) -> dict[str, Any]:
    streamed = STREAMED if run.work.device.type == "cuda" else 1 << 20
    found = {}
    for side in run.work.load.matrices:
        found[str(side)] = kernels(side, run.work.device, run.repetitions, streamed)
        run.say(f"kernels of {side} x {side}")
        run.keep("kernels", found)
        fresh(run.work.device)
    return found


def show(document: dict[str, Any]) -> None:
    """The figures as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=150)
    cases = document["cases"]

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left")
        for i, column in enumerate(columns):
            made.add_column(column, justify="right" if i else "left", no_wrap=True)
        return made

    def said(values: Sequence[float], form: str = ".2f") -> str:
        return rf"{values[0]:{form}} \[{values[1]:{form}}, {values[2]:{form}}]"

    steps = table(
        r"Steps and completions, tokens/s: median \[least, most]", "case", "ours", "theirs", "ratio",
        "MiB ours", "MiB theirs", "share of peak, ours", "theirs",
    )  # fmt: skip
    rows = {kind: (cases[kind], "trl") for kind in PASSES if "ratio" in cases.get(kind, {})}
    rows |= {f"generation {n}": (f, "transformers") for n, f in cases.get("generation", {}).items() if "ratio" in f}
    for name, (found, other) in rows.items():
        shares = [f"{found[s]['utilisation'][0]:.1%}" if "utilisation" in found[s] else "" for s in ("ours", other)]
        rates = [said(found[s]["tokens_per_second"], ",.0f") for s in ("ours", other)]
        memory = [f"{found[s]['peak_mib']:,.0f}" for s in ("ours", other)]
        steps.add_row(name, *rates, said(found["ratio"]), *memory, *shares)
    console.print(steps)
    for side, found in cases.get("kernels", {}).items():
        if BF16 not in found:
            continue
        products_ = table(f"One row by {side} x {side}", "", "µs", "GB/s", f"times as fast as {BF16}", "with launches")
        for name, one in found.items():
            if name != "failed":
                products_.add_row(
                    name, f"{statistics.median(one['seconds']) * 1e6:.1f}", f"{one['bytes_per_second'] / 1e9:,.0f}",
                    said(one["ratio"]), f"{one['launched_ratio']:.2f}",
                )  # fmt: skip
        console.print(products_)
    if "ceilings" in cases and "flops" in cases["ceilings"]:
        ceiling = cases["ceilings"]
        print(f"ceilings: {ceiling['flops'] / 1e12:.1f} TFLOP/s in bf16, {ceiling['bytes'] / 1e12:.2f} TB/s of a copy")
    for name, found in cases.items():
        if isinstance(found, dict) and "error" in found:
            print(f"{name} failed: {found['error']}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="On a GPU beside TRL.")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repetitions", type=int, default=3, help="how often the sides take turns (default 3)")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which no case is repeated (default: none)")
    parser.add_argument("--quick", action="store_true", help="one repetition: does it run?")
    parser.add_argument(
        "--json",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "gpu.json",
        metavar="PATH",
        help="for the figures",
    )
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=list(SIZES), default="1.5b", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.repetitions = 1
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no GPU (torch.cuda.is_available() is false)", file=sys.stderr)
        return 1
    warnings.simplefilter("ignore")
    quiet()
    work = Work(SIZES[options.size], torch.device(options.device))
    run = Run(options, work)
    run.say(json.dumps(run.document["machine"]))
    jobs: dict[str, Callable[[float], Any]] = {
        "ceilings": lambda share: ceilings(work.device, work.load.square, options.repetitions),
        "kernels": lambda share: products(run, share),
        "generation": lambda share: generating(run, share),
        **{kind: lambda share, kind=kind: training(run, kind, share) for kind in PASSES},  # type: ignore[misc]
    }
    wanted = ["ceilings", *(name for name in CASES if name in options.cases)]
    whole, share = sum(SHARES[name] for name in wanted), 0.0
    for name in wanted:
        share += SHARES[name] / whole
        try:
            run.keep(name, jobs[name](share))
        except Exception as error:  # the others are measured all the same
            traceback.print_exc()
            run.keep(name, {**run.document["cases"].get(name, {}), "error": f"{type(error).__name__}: {error}"[:500]})
        fresh(work.device)
        run.say(f"{name} done")
    show(run.document)
    print(f"written: {options.json}", file=sys.stderr)
    return int(any("error" in found for found in run.document["cases"].values()))


def quiet() -> None:
    """No progress bars and no advice of other libraries."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        from datasets.utils import disable_progress_bars

        disable_progress_bars()
    except ImportError:
        print("datasets is not installed; TRL will not run", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
