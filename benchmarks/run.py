"""The benchmark: ours and TRL in turn, a process for each measurement, then the ratios; `python -m benchmarks.run`.

This process imports neither side, so that the peak memory of a worker is the worker's own (a child starts from its
parent's).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.child import ROOT, BenchmarkError, answer
from benchmarks.measurement import Arm, Measurement, Task
from benchmarks.summary import CaseResult, fastest, record
from benchmarks.workload import CASES, MAIN, Case

PRECISIONS = (Arm("fp32"), Arm("bf16"))
CUT = tuple(Arm(p.weights, pieces=4) for p in PRECISIONS)  # a batch of rollouts is meant to be cut, and faster so
CLEARLY = 1.05  # times the fastest arm's seconds, from which on another takes no more turns
LOSS_TOLERANCE = 0.05  # of the first loss; TRL's SFT loss also counts the line break after a row's end token


@dataclass(frozen=True, slots=True)
class Plan:
    """repetitions: of ours and TRL in turn, if not as many as the case has turns; warmup, steps: of each measurement;
    screen: try every arm of TRL first, not its two precisions alone.
    """

    model: str
    repetitions: int | None
    warmup: int
    steps: int
    screen: bool


def arms_of(case: Case) -> list[Arm]:
    """Ways to run TRL that its users might choose on a CPU.

    Cutting a batch into micro-batches saves the padding and the memory of a wide one; `CaseResult.compared` keeps
    those apart, since they no longer compute the batch that is asked for at once.
    """
    finer = [4, 8] if case.name == "sft" else [4]
    cuts = [(False, 1), (True, 1), *((False, pieces) for pieces in finer)]
    ways = [Arm(p.weights, checkpointing, pieces) for p in PRECISIONS for checkpointing, pieces in cuts]
    return [*ways, Arm("bf16", paged=True)] if case.online else ways


def measure_case(case: Case, plan: Plan, throughputs: list[dict[str, float]]) -> CaseResult:
    """Measure ours and TRL in turn; adds the matrix throughput measured before each repetition to `throughputs`."""
    screened: dict[Arm, Measurement] = {}
    chosen: Sequence[Arm] = [*PRECISIONS, *CUT] if case.online else PRECISIONS
    if plan.screen:
        for arm in arms_of(case):
            screened[arm] = measure(Task("trl", plan.model, case.name, warmup=1, steps=1, arm=arm))
        chosen = contenders(case, screened)
    result = CaseResult(case, [], {arm: [] for arm in chosen}, screened)
    for _ in range(plan.repetitions or case.turns):
        throughputs.append(work(Task("matrix", plan.model)))
        ours = measure(Task("ours", plan.model, case.name, plan.warmup, plan.steps))
        result.ours.append(ours)
        for arm in list(result.repeated):
            theirs = measure(Task("trl", plan.model, case.name, plan.warmup, plan.steps, arm))
            check_same_work(case, ours, theirs)
            result.repeated[arm].append(theirs)
        if not plan.screen:
            drop_slow(result)
    return result


def drop_slow(result: CaseResult) -> None:
    """Take no more turns with arms that so far are clearly slower than the fastest; their turns stay as trials."""
    seconds = {arm: sum(m.mean_seconds for m in found) for arm, found in result.repeated.items()}
    for arm in [a for a in seconds if seconds[a] > CLEARLY * min(seconds.values())]:
        result.screened[arm] = result.repeated.pop(arm)[0]


def contenders(case: Case, screened: dict[Arm, Measurement]) -> list[Arm]:
    """The arms worth repeating: the fastest that computes the batch at once for each precision, and the fastest."""
    arms = {arm: [m] for arm, m in screened.items()}
    at_once = {a: m for a, m in arms.items() if case.online or a.pieces == 1}
    best = [fastest({a: m for a, m in at_once.items() if a.weights == p.weights}) for p in PRECISIONS]
    return list(dict.fromkeys([*best, fastest(arms)]))


def measure(task: Task) -> Measurement:
    """Run one measurement in a process of its own."""
    found = Measurement(**work(task))
    side = f"{task.case} {task.side}" + (f" ({task.arm})" if task.arm else "")
    said = f"{side}: {found.mean_seconds:.2f} s a step, peak {found.peak_mib:,.0f} MiB"
    print(f"{time.strftime('%H:%M:%S')} {said}", file=sys.stderr, flush=True)
    return found


def work(task: Task) -> dict[str, Any]:
    """A worker's answer."""
    return answer([sys.executable, "-m", "benchmarks.worker", task.json], f"the worker for {task}")


def check_same_work(case: Case, ours: Measurement, theirs: Measurement) -> None:
    """Both sides took the same sequences (online: the same prompts, as many completions) with as many threads."""
    mine, other = (
        [[(p, len(parts) if case.online else parts) for p, parts in step] for step in m.groups] for m in (ours, theirs)
    )
    if mine != other:
        raise BenchmarkError(f"{case.name}: the sides took different sequences:\nours {mine}\nTRL  {other}")
    if ours.threads != theirs.threads:
        raise BenchmarkError(f"{case.name}: {ours.threads} threads ours, {theirs.threads} TRL; expected as many")
    apart = abs(ours.first_loss - theirs.first_loss)
    if not case.online and apart > LOSS_TOLERANCE * abs(theirs.first_loss):
        raise BenchmarkError(f"{case.name}: first loss {ours.first_loss} ours, {theirs.first_loss} TRL; expected one")


def hardware() -> dict[str, Any]:
    """What the figures were measured on."""
    processor = platform.processor() or platform.machine()
    flags: set[str] = set()
    if (cpuinfo := Path("/proc/cpuinfo")).is_file():
        lines = dict(line.split(":", 1) for line in cpuinfo.read_text(encoding="utf-8").splitlines() if ":" in line)
        known = {key.strip(): value.strip() for key, value in lines.items()}
        processor, flags = known.get("model name", processor), set(known.get("flags", "").split())
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "bf16": sorted(flags & {"avx512_bf16", "amx_bf16"}),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
        "system": f"{platform.system()} {platform.machine()}",
    }


def document(plan: Plan, load: float, results: Sequence[CaseResult], throughput: dict[str, float]) -> dict[str, Any]:
    """Everything measured, and on what, for the JSON file."""
    packages = ("posttrain", "trl", "torch", "transformers", "accelerate")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "model": Path(plan.model).name,
        "settings": {"warmup": plan.warmup, "steps": plan.steps, "load_before": load},
        "matrix_throughput": throughput,
        "cases": {r.case.name: record(r, max(throughput.values())) for r in results},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    plan = Plan(options.model, options.repetitions, options.warmup, options.steps, options.screen)
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"warning: other processes are busy (load {load:.1f}); figures will be off", file=sys.stderr)
    throughputs: list[dict[str, float]] = []
    try:
        work(Task("model", plan.model))
        results = [measure_case(CASES[name], plan, throughputs) for name in options.cases]
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    best = {name: max(t[name] for t in throughputs) for name in throughputs[0]}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    found = rounded(document(plan, load, results, best))
    options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    from rich.console import Console

    from benchmarks.table import show

    show(results, max(best.values()), Console() if sys.stdout.isatty() else Console(width=180))
    print(f"written: {options.json.name}", file=sys.stderr)
    return 0


def rounded(value: Any) -> Any:
    """Plain data with its numbers to six digits, which is more than a clock gives."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Speed and memory beside TRL.")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(MAIN))
    parser.add_argument("--repetitions", type=int, help="of ours and TRL in turn (default 1 to 3, by the case)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before the clock starts, at least 1 (default 1)")
    parser.add_argument("--steps", type=int, default=2, help="timed steps a measurement (default 2)")
    parser.add_argument("--screen", action="store_true", help="try every arm of TRL first")
    parser.add_argument("--quick", action="store_true", help="one repetition of one step: does it run?")
    parser.add_argument("--model", default="smollm2-135m", help="a bundled model or a folder (default smollm2-135m)")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "cpu.json", metavar="PATH")
    options = parser.parse_args(arguments)
    if options.quick:
        options.repetitions, options.steps, options.screen = 1, 1, False
    for name in ("repetitions", "warmup", "steps"):
        if (given := getattr(options, name)) is not None and given < 1:
            parser.error(f"--{name} is {given}; expected at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
