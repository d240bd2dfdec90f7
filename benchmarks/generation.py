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
from collections.abc import Sequence
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
        return self.transformers if side == "transformers" else self.vllm


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
    """seconds: of the call; lengths: of each prompt's completions, tokens; peak_mib: of the process."""

    seconds: float
    lengths: list[list[int]]
    peak_mib: float

    @property
    def rate(self) -> float:
        """Completion tokens a second."""
        return sum(map(sum, self.lengths)) / self.seconds


# One measurement


def prompt_tokens(load: Load, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Token ids drawn by seed from the plain words of the vocabulary: text without an end in sight."""
    import random

    draw = random.Random(seed)
    return [[draw.randrange(vocabulary // 8, vocabulary) for _ in range(load.length)] for _ in range(load.prompts)]


def ours(load: Load, folder: str) -> tuple[float, list[list[int]]]:
    import torch

    from posttrain.models.load import load as load_model
    from posttrain.rollout.embedded import EmbeddedEngine
    from posttrain.trajectory import Prompt, Sampling

    policy = load_model(folder, precision="bf16")
    engine = EmbeddedEngine(policy)
    drawn = prompt_tokens(load, len(policy.tokenizer))
    prompts = [Prompt(torch.tensor(tokens), key=i) for i, tokens in enumerate(drawn)]
    engine.generate(prompts[:2], 1, Sampling(max_tokens=4), seed=1)
    begun = time.perf_counter()
    found = engine.generate(prompts, load.samples, Sampling(max_tokens=load.tokens), seed=0)
    seconds = time.perf_counter() - begun
    return seconds, [[len(c.tokens) for c in completions] for completions in found]


def transformers(load: Load, folder: str) -> tuple[float, list[list[int]]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    given = torch.tensor(prompt_tokens(load, len(tokenizer)))
    options: dict[str, Any] = {
        "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": tokenizer.eos_token_id,
    }  # fmt: skip

    def sample(inputs: torch.Tensor, count: int, tokens: int) -> torch.Tensor:
        mask = torch.ones_like(inputs)
        return model.generate(inputs, attention_mask=mask, num_return_sequences=count, max_new_tokens=tokens, **options)

    with torch.inference_mode():
        sample(given[:2], 1, 4)
        begun = time.perf_counter()
        found = sample(given, load.samples, load.tokens)[:, load.length :]
        seconds = time.perf_counter() - begun
    ends = model.generation_config.eos_token_id or tokenizer.eos_token_id
    is_end = torch.isin(found, torch.tensor(ends))
    first = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, found.shape[1])
    return seconds, first.view(load.prompts, load.samples).tolist()


def vllm(load: Load, folder: str) -> tuple[float, list[list[int]]]:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]

    engine = LLM(folder, dtype="bfloat16", max_model_len=load.length + load.tokens, seed=0, disable_log_stats=True)
    drawn = prompt_tokens(load, len(engine.get_tokenizer()))
    given = [{"prompt_token_ids": tokens} for tokens in drawn]

    def sample(inputs: list[Any], count: int, tokens: int) -> list[Any]:
        wanted = SamplingParams(n=count, temperature=1.0, top_k=0, top_p=1.0, max_tokens=tokens, logprobs=0)
        return list(engine.generate(inputs, wanted, use_tqdm=False))

    sample(given[:2], 1, 4)
    begun = time.perf_counter()
    found = sample(given, load.samples, load.tokens)
    return time.perf_counter() - begun, [[len(c.token_ids) for c in out.outputs] for out in found]


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


def worker(side: Side, load: Load, folder: str) -> None:
    import resource
    import warnings

    warnings.simplefilter("ignore")
    if side == "machine":
        print(json.dumps(machine(folder)), flush=True)
        return
    seconds, lengths = {"ours": ours, "transformers": transformers, "vllm": vllm}[side](load, folder)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
    print(json.dumps(asdict(Generated(seconds, lengths, peak))), flush=True)


# The run


def run(side: Side, load: Load, folder: str, python: str = sys.executable) -> dict[str, Any]:
    """What a process of its own answered."""
    on_cpu = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR"} if side == "vllm" else None
    command = [python, "-m", "benchmarks.generation", "--worker", side, "--loads", load.name, "--folder", folder]
    return answer(command, f"{load.name} by {side}", on_cpu)


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
    about = run("machine", loads[0], folder)
    found: dict[str, Any] = {"machine": about, "loads": {}}
    for load in loads:
        times: dict[Side, list[Generated]] = {side: [] for side in sides}
        for _ in range(repetitions):
            for side, python in sides.items():
                times[side].append(Generated(**run(side, load, folder, python)))
                last = times[side][-1]
                print(f"{time.strftime('%H:%M:%S')} {load.name} {side}: {last.rate:,.0f} tokens/s", file=sys.stderr)
        entry: dict[str, Any] = {}
        for side, each in times.items():
            ratios = [a.rate / b.rate for a, b in zip(times["ours"], each, strict=True)]
            floor = [g.seconds / roofline_seconds(about, load, g.lengths) for g in each]
            entry[side] = {
                "rate": statistics.median(g.rate for g in each),
                "ratio": [statistics.median(ratios), min(ratios), max(ratios)],
                "wanted": load.wanted(side),
                "roofline": statistics.median(floor),
                "peak_mib": max(g.peak_mib for g in each),
                "tokens": sum(map(sum, each[0].lengths)),
            }
        found["loads"][load.name] = entry
    return found


def show(found: dict[str, Any], left_out: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=r"Generation: completion tokens/s, ours over theirs \[least, most]", title_justify="left")
    for column in ("load", "side", "tokens/s", "ratio", "wanted", "× roofline", "peak MiB"):
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
                f"{entry['peak_mib']:,.0f}",
            )
    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(table)
    for side in left_out:
        console.print(f"{side} was left out: no environment with it", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description="Generation beside peers.")
    parser.add_argument("--loads", nargs="+", choices=list(LOADS), default=list(LOADS))
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="the first load, once: does it run?")
    parser.add_argument("--model", default="smollm2-135m", help="a bundled model or a folder (default smollm2-135m)")
    parser.add_argument("--vllm-python", default=str(ROOT / ".venv-vllm" / "bin" / "python"), metavar="PATH")
    parser.add_argument("--json", type=Path, default=RESULT, help="where the figures go")
    parser.add_argument("--worker", choices=("ours", "transformers", "vllm", "machine"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker, LOADS[given.loads[0]], given.folder)
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
