"""Pure generation beside `transformers.generate` and vLLM: completion tokens a second, in turn, a process each.

`python -m benchmarks.generation` samples the same prompts with each side in bf16, temperature 1, and prints the ratios
with their spread and the distance from a roofline. vLLM stands in an environment of its own (`make test-vllm` makes
one); without it that side is left out, and the table says so. Only a quiet machine gives figures that mean something;
`--quick` tries the shortest case once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.child import ROOT, BenchmarkError, answer
from benchmarks.roofline import Size, forward_work
from benchmarks.run import hardware, rounded

RESULT = ROOT / "benchmarks" / "results" / "generation.json"
Side = Literal["ours", "transformers", "vllm", "machine"]


@dataclass(frozen=True, slots=True)
class Load:
    """prompts of `length` tokens, `samples` completions of each, of `tokens` at most; and the ratios wanted."""

    name: str
    prompts: int
    samples: int
    length: int
    tokens: int
    transformers: float | None = None
    vllm: float | None = None

    def wanted(self, side: Side) -> float | None:
        return {"transformers": self.transformers, "vllm": self.vllm}.get(side)


LOADS = {
    load.name: load
    for load in (
        Load("64x64", 64, 1, 24, 64, transformers=3.0, vllm=2.0),
        Load("groups", 8, 8, 48, 64),
        Load("long-prompts", 4, 16, 512, 16),
        Load("long-completions", 16, 1, 24, 256),
    )
}


@dataclass(slots=True)
class Generated:
    """seconds: of the call; lengths: of each prompt's completions, tokens."""

    seconds: float
    lengths: list[list[int]]

    @property
    def rate(self) -> float:
        """Completion tokens a second."""
        return sum(map(sum, self.lengths)) / self.seconds


# One measurement


# prompts' tokens, completions of each, tokens at most -> the lengths of each prompt's completions
Sampler = Callable[[list[list[int]], int, int], list[list[int]]]


def prompt_tokens(load: Load, vocabulary: int, use: str = "timed") -> list[list[int]]:
    """Token ids drawn from the plain words of the vocabulary: text without an end in sight. Other ones for each load
    and use, so that no side finds a prompt in its cache."""
    import random

    draw = random.Random(f"{load.name} {use}")
    return [[draw.randrange(vocabulary // 8, vocabulary) for _ in range(load.length)] for _ in range(load.prompts)]


def ours(folder: str, longest: int) -> tuple[Sampler, int]:
    import torch

    from posttrain.models.load import load
    from posttrain.rollout.embedded import EmbeddedEngine
    from posttrain.trajectory import Prompt, Sampling

    policy = load(folder, precision="bf16")
    engine = EmbeddedEngine(policy)

    def sample(given: list[list[int]], count: int, tokens: int) -> list[list[int]]:
        prompts = [Prompt(torch.tensor(each), key=i) for i, each in enumerate(given)]
        found = engine.generate(prompts, count, Sampling(max_tokens=tokens), seed=0)
        return [[len(c.tokens) for c in completions] for completions in found]

    return sample, len(policy.tokenizer)


def transformers(folder: str, longest: int) -> tuple[Sampler, int]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ends = torch.tensor(model.generation_config.eos_token_id or tokenizer.eos_token_id)
    options: dict[str, Any] = {
        "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": tokenizer.eos_token_id,
    }  # fmt: skip

    @torch.inference_mode()
    def sample(given: list[list[int]], count: int, tokens: int) -> list[list[int]]:
        inputs = torch.tensor(given)
        mask = torch.ones_like(inputs)
        found = model.generate(
            inputs, attention_mask=mask, num_return_sequences=count, max_new_tokens=tokens, **options
        )[:, inputs.shape[1] :]
        is_end = torch.isin(found, ends)
        first = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, found.shape[1])
        lengths: list[list[int]] = first.view(len(given), count).tolist()
        return lengths

    return sample, len(tokenizer)


def vllm(folder: str, longest: int) -> tuple[Sampler, int]:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]

    engine = LLM(folder, dtype="bfloat16", max_model_len=longest, seed=0, disable_log_stats=True)

    def sample(given: list[list[int]], count: int, tokens: int) -> list[list[int]]:
        prompts = [{"prompt_token_ids": each} for each in given]
        wanted = SamplingParams(n=count, temperature=1.0, top_k=0, top_p=1.0, max_tokens=tokens, logprobs=0)
        found = engine.generate(prompts, wanted, use_tqdm=False)
        return [[len(c.token_ids) for c in out.outputs] for out in found]

    return sample, len(engine.get_tokenizer())


def measured(side: Side, loads: Sequence[Load], folder: str) -> list[Generated]:
    """Each load by one engine, warmed up by a few tokens of its kind."""
    start = {"ours": ours, "transformers": transformers, "vllm": vllm}[side]
    sample, vocabulary = start(folder, max(load.length + load.tokens for load in loads))
    found = []
    for load in loads:
        given = prompt_tokens(load, vocabulary)
        sample(prompt_tokens(load, vocabulary, "warm-up")[:2], 1, 4)
        begun = time.perf_counter()
        lengths = sample(given, load.samples, load.tokens)
        found.append(Generated(time.perf_counter() - begun, lengths))
    return found


def machine(folder: str) -> dict[str, Any]:
    """What the roofline needs: products and reads a second of this machine, the model's size and bytes."""
    import torch

    from benchmarks.ours import size_of
    from benchmarks.roofline import matrix_throughput
    from posttrain.models.load import load as load_model

    policy = load_model(folder, precision="bf16")
    size = size_of(policy)
    big, best = torch.ones(256 << 20, dtype=torch.uint8).view(torch.int64), float("inf")
    for _ in range(10):
        begun = time.perf_counter()
        big.sum()
        best = min(best, time.perf_counter() - begun)
    read = 2 * (size.body + size.vocabulary * size.width)
    throughput = max(matrix_throughput().values())
    return {"size": asdict(size), "bytes": read, "bandwidth": big.nbytes / best, "throughput": throughput}


def worker(side: Side, loads: Sequence[Load], folder: str) -> None:
    import warnings

    warnings.simplefilter("ignore")
    if side == "machine":
        found: Any = machine(folder)
    else:
        found = [asdict(each) for each in measured(side, loads, folder)]
    print(json.dumps({"found": found}), flush=True)


# The run


def run(side: Side, loads: Sequence[Load], folder: str, python: str = sys.executable) -> Any:
    """What a process of its own answered."""
    on_cpu = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR"} if side == "vllm" else None
    names = [load.name for load in loads]
    command = [python, "-m", "benchmarks.generation", "--worker", side, "--folder", folder, "--loads", *names]
    return answer(command, f"generation by {side}", on_cpu)["found"]


def roofline_seconds(about: dict[str, Any], load: Load, lengths: list[list[int]]) -> float:
    """Work of all prompts (once each) and completions over the throughput, or, where that is more, the reading of the
    weights once for the prompts and once a decode step over the bandwidth.
    """
    groups = [(load.length, each) for each in lengths]
    steps = 1 + max(map(max, lengths))
    return max(
        forward_work(Size(**about["size"]), groups) / about["throughput"], about["bytes"] * steps / about["bandwidth"]
    )


def measure(loads: Sequence[Load], sides: dict[Side, str], folder: str, repetitions: int) -> dict[str, Any]:
    """All loads by each side, side by side in every repetition: a process of its own, since vLLM takes minutes to
    start and its memory is wanted by the next."""
    about = run("machine", loads, folder)
    times: dict[Side, list[list[Generated]]] = {side: [] for side in sides}
    for _ in range(repetitions):
        for side, python in sides.items():
            times[side].append([Generated(**each) for each in run(side, loads, folder, python)])
            rates = ", ".join(f"{load.name} {g.rate:,.0f}" for load, g in zip(loads, times[side][-1], strict=True))
            print(f"{time.strftime('%H:%M:%S')} {side}, tokens/s: {rates}", file=sys.stderr)
    found: dict[str, Any] = {"machine": about, "loads": {}}
    for number, load in enumerate(loads):
        entry: dict[str, Any] = {}
        own = [turn[number] for turn in times["ours"]]
        for side, turns in times.items():
            each = [turn[number] for turn in turns]
            ratios = [a.rate / b.rate for a, b in zip(own, each, strict=True)]
            floor = [g.seconds / roofline_seconds(about, load, g.lengths) for g in each]
            entry[side] = {
                "rate": statistics.median(g.rate for g in each),
                "ratio": [statistics.median(ratios), min(ratios), max(ratios)],
                "wanted": load.wanted(side),
                "roofline": statistics.median(floor),
                "tokens": sum(map(sum, each[0].lengths)),
            }
        found["loads"][load.name] = entry
    return found


def show(found: dict[str, Any], left_out: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=r"Generation: completion tokens/s, ours over theirs \[least, most]", title_justify="left")
    for column in ("load", "side", "tokens/s", "ratio", "wanted", "× roofline"):
        table.add_column(column, justify="left" if column in ("load", "side") else "right", no_wrap=True)
    for name, sides in found["loads"].items():
        for side, entry in sides.items():
            middle, least, most = entry["ratio"]
            ratio = "" if side == "ours" else rf"{middle:.2f} \[{least:.2f}, {most:.2f}]"
            wanted = "" if entry["wanted"] is None else f"≥ {entry['wanted']:g} "
            if wanted:
                wanted += "met" if middle >= entry["wanted"] else "missed"
            table.add_row(
                name,
                side,
                f"{entry['rate']:,.0f}",
                ratio,
                wanted,
                f"{entry['roofline']:.1f}",
            )
    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(table)
    for side in left_out:
        console.print(f"{side} was left out: no environment with it", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description="Generation beside peers.")
    parser.add_argument("--loads", nargs="+", choices=list(LOADS), default=list(LOADS))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the first load, once: does it run?")
    parser.add_argument("--model", default="smollm2-135m", help="a bundled model or a folder (default smollm2-135m)")
    parser.add_argument("--vllm-python", default=str(ROOT / ".venv-vllm" / "bin" / "python"), metavar="PATH")
    parser.add_argument("--json", type=Path, default=RESULT, help="where the figures go")
    parser.add_argument("--worker", choices=("ours", "transformers", "vllm", "machine"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker, [LOADS[name] for name in given.loads], given.folder)
        return 0
    loads = [LOADS[name] for name in given.loads]
    if given.quick:
        loads, given.repetitions = loads[:1], 1
    from benchmarks.worker import model_folder

    sides: dict[Side, str] = {"ours": sys.executable, "transformers": sys.executable}
    has_vllm = Path(given.vllm_python).is_file()
    if has_vllm:
        sides["vllm"] = given.vllm_python
    try:
        found = measure(loads, sides, str(model_folder(given.model)), given.repetitions)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(found, [] if has_vllm else ["vllm"])
    about = {"date": time.strftime("%Y-%m-%d"), "hardware": hardware(), "repetitions": given.repetitions}
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(rounded(about | found), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
