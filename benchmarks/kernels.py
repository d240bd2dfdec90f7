"""The CPU kernels of packed weights beside torch's, in turn in one process; `python -m benchmarks.kernels`.

Three questions: how long does one row of inputs take (as in decoding), by a matrix that stays in the cache and by one
that comes from memory; up to how many rows do the kernels pay; and how much faster does a model of a billion parameters
decode.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.run import hardware, rounded
from posttrain.compress.kernels.dispatch import by_panels
from posttrain.compress.kernels.integers import code_product, int8_product, scaled_product
from posttrain.compress.kernels.library import LEVELS, best_level, forced
from posttrain.compress.kernels.planes import plane_product
from posttrain.compress.kernels.uniform import uniform_product
from posttrain.compress.packed.linear import PackedLinear
from posttrain.compress.packed.scales import Scales
from posttrain.compress.packed.table import TableWeight
from posttrain.compress.packed.ternary import TernaryWeight
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.compress.packed.vector import Books, VectorWeight
from posttrain.compress.packed.weight import PackedWeight

ROOT = Path(__file__).resolve().parent.parent
SIZE, GROUP = 4096, 128
BF16, INT8 = "torch bf16", "int8"  # what ratios are taken to
COUNTS = (1, 2, 4, 8, 16, 32, 64)
MODEL: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip
PROMPT = 16
# ratios asked for: contender -> (beside, at least)
WANTED = {
    "planes W2 A8": ((INT8, 2.0), (BF16, 6.0)),
    "decoding, 4 bits": (("decoding, bf16", 2.5),),
    "decoding, 2 bits": (("decoding, bf16", 3.5),),
}

Call = Callable[[], object]
Clock = Callable[[], float]
# the thread's own time leaves out that of others on a shared machine, though not what they do to the caches
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "thread": time.thread_time}


@dataclass(slots=True)
class Contender:
    """calls: the same product by copies of the matrix, of `size` bytes together; seconds: one a repetition."""

    name: str
    calls: list[Call]
    size: int
    seconds: list[float] = field(default_factory=list)

    def time(self, least: float, clock: Clock) -> None:
        """One repetition: the calls in turn until `least` seconds are over; the best, least disturbed, tenth."""
        taken: list[float] = []
        begun = clock()
        while len(taken) < max(3, len(self.calls)) or clock() - begun < least:
            before = clock()
            self.calls[len(taken) % len(self.calls)]()
            taken.append(clock() - before)
        self.seconds.append(sorted(taken)[len(taken) // 10])


def contenders(streamed: int) -> Iterator[Contender]:
    """Products of one row of inputs by 4096 x 4096 weights. streamed: bytes of copies that a contender goes through."""
    x = torch.randn(1, SIZE)
    half, bytes_, scale = x.to(torch.bfloat16), torch.randint(-128, 128, (1, SIZE), dtype=torch.int8), torch.ones(1)

    def of(name: str, weight: Any, call: Callable[[Any], object]) -> Contender:
        tensors = list(weight.buffers()) if isinstance(weight, PackedWeight) else [weight]
        size = sum(t.numel() * t.element_size() for t in tensors)
        copies = [weight, *(copy.deepcopy(weight) for _ in range(streamed // size))]
        return Contender(name, [partial(call, each) for each in copies], size * len(copies))

    def planes(bits: int, input_bits: int) -> Contender:
        inputs, sums, scales = words(1, input_bits), torch.zeros(1, 1), torch.ones(SIZE, 1, dtype=torch.float16)
        return of(
            f"planes W{bits} A{input_bits}",
            words(SIZE, bits),
            lambda w: plane_product(inputs, scale, sums, w, scales, None, "none", SIZE),
        )

    def codes(bits: int) -> Contender:
        return of(
            f"codes W{bits} A8, groups of {GROUP}",
            uniform(bits),
            lambda w: scaled_product(bytes_, scale, w.codes, w.scale, w.zero, bits, "integer"),
        )

    yield of(BF16, torch.randn(SIZE, SIZE).to(torch.bfloat16), lambda w: F.linear(half, w))
    yield of(INT8, signed(SIZE, SIZE), lambda w: int8_product(bytes_, w))
    yield of("torch int8, bf16 inputs", signed(SIZE, SIZE), torch_int8(half))
    yield of("torch 4 bits, bf16 inputs", signed(SIZE, SIZE // 2).view(torch.uint8), torch_int4(half))
    for bits in (2, 3, 4, 8):
        yield of(f"{bits} bits, groups of {GROUP}", uniform(bits), lambda w: w.product(half))
    yield of("4 bits, fp32 inputs", uniform(4), lambda w: w.product(x))
    yield of("NF4, groups of 64", nf4(), lambda w: w.product(half))
    yield of("two ternary planes", ternary(), lambda w: w.product(half))
    yield of("vectors of 8, 2 bits", vectors(), lambda w: w.product(half))
    yield from (codes(bits) for bits in (2, 4))
    yield of("codes W2 A8, sums of rows", uniform(2).codes, lambda w: code_product(bytes_, w, 2))
    yield from (planes(bits, others) for bits, others in ((1, 8), (2, 4), (2, 8), (3, 8), (4, 4)))


def uniform(bits: int, rows: int = SIZE, columns: int = SIZE) -> UniformWeight:
    made = UniformWeight((rows, columns), bits, columns // GROUP, "integer", False)
    assert made.zero is not None
    made.codes.fill_(0x5A)  # what they are does not matter to the time; that they were written to does
    made.zero.fill_(0x5A)
    made.scale.fill_(0.05 / 2**bits)
    return made


def signed(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def words(rows: int, bits: int) -> Tensor:
    return torch.randint(-(2**62), 2**62, (rows, SIZE // 512, bits, 8))


def ternary() -> TernaryWeight:
    trits = torch.randint(-1, 2, (2, SIZE, SIZE), dtype=torch.int8)
    return TernaryWeight.of(trits, torch.ones(2, SIZE, SIZE // GROUP))


def nf4() -> TableWeight:
    codes = torch.randint(0, 16, (SIZE, SIZE), dtype=torch.uint8)
    return TableWeight.of(codes, Scales.of(torch.ones(SIZE, SIZE // 64), "half"), 4, "nf4")


def vectors() -> VectorWeight:
    books, indices = Books(8, 16), torch.randint(0, 1 << 16, (SIZE // 8, SIZE))
    return VectorWeight.of(SIZE, [(books, indices, torch.randn(1 << 16, 8), None)])


def torch_int8(x: Tensor) -> Callable[[Tensor], object]:
    """torch's product by int8 weights with a scale a row."""
    scales = torch.ones(SIZE, dtype=torch.bfloat16)
    return lambda w: torch.ops.aten._weight_int8pack_mm(x, w, scales)


def torch_int4(x: Tensor) -> Callable[[Tensor], object]:
    """torch's product by 4-bit weights with scales and float zeros of groups, packed as it wants them."""
    scales = torch.ones(SIZE // GROUP, SIZE, 2, dtype=torch.bfloat16)
    return lambda w: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, GROUP, scales)


def one_row(streamed: int, repetitions: int, least: float, clock: Clock) -> list[Contender]:
    found = []
    for each in contenders(streamed):
        try:
            each.calls[0]()
        except (RuntimeError, NotImplementedError) as error:
            print(f"{each.name} is not measured: {' '.join(str(error).split())[:100]}", file=sys.stderr)
            continue
        found.append(each)
    for _ in range(repetitions):
        for each in found:
            each.time(least, clock)
    return found


def crossover(repetitions: int, least: float, clock: Clock) -> dict[str, dict[str, list[float]]]:
    """Seconds by number of rows: the kernel, values made in panels and multiplied, and torch in bf16."""
    found: dict[str, dict[str, list[float]]] = {}
    plain = torch.randn(SIZE, SIZE).to(torch.bfloat16)
    for bits in (2, 4):
        weight = uniform(bits)
        for count in COUNTS:
            x = torch.randn(count, SIZE).to(torch.bfloat16)
            ways: dict[str, Call] = {
                "kernel": lambda x=x, w=weight: uniform_product(x, w.codes, w.scale, w.zero, w.bits, w.kind),  # type: ignore[misc]
                "values": lambda x=x, w=weight: by_panels(x, w.shape, w.values),  # type: ignore[misc]
                BF16: lambda x=x: F.linear(x, plain),  # type: ignore[misc]
            }
            timed = [Contender(name, [call], 0) for name, call in ways.items()]
            for _ in range(repetitions):
                for each in timed:
                    each.time(least, clock)
            found[f"{bits} bits, {count} rows"] = {each.name: each.seconds for each in timed}
    return found


def decoding(repetitions: int, tokens: int, clock: Clock) -> list[Contender]:
    """Seconds a token of a model whose blocks' linear layers are bf16, or packed; the rest stays bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model: Any = LlamaForCausalLM(LlamaConfig(**MODEL))
        model.to(torch.bfloat16)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.fill_(0.01)
    inner = model.model
    inner.rotary_emb = type(inner.rotary_emb)(model.config)
    blocks = [(parent, name, child) for parent in inner.layers.modules() for name, child in parent.named_children()]
    places = [(p, n, c) for p, n, c in blocks if isinstance(c, nn.Linear)]
    arms: dict[str, list[nn.Module]] = {"decoding, bf16": [c for _, _, c in places]}
    for bits in (4, 2):
        arms[f"decoding, {bits} bits"] = [
            PackedLinear(uniform(bits, c.out_features, c.in_features)) for _, _, c in places
        ]
    timed = [Contender(name, [], sum(_bytes(m) for m in layers)) for name, layers in arms.items()]
    for _ in range(repetitions):
        for each, layers in zip(timed, arms.values(), strict=True):
            for (parent, name, _), layer in zip(places, layers, strict=True):
                setattr(parent, name, layer)
            each.seconds.append(_seconds_a_token(model, tokens, clock))
    return timed


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


@torch.no_grad()
def _seconds_a_token(model: Any, tokens: int, clock: Clock) -> float:
    step = model(input_ids=torch.arange(PROMPT)[None], use_cache=True)
    taken = []
    for token in range(tokens):
        before = clock()
        step = model(input_ids=torch.tensor([[token]]), past_key_values=step.past_key_values, use_cache=True)
        taken.append(clock() - before)
    return statistics.median(taken)


def ratios(found: Sequence[Contender], beside: str) -> dict[str, dict[str, Any]]:
    """How many times faster than one of them each is, repetition by repetition."""
    base = next((each for each in found if each.name == beside), None)
    if base is None:
        return {}
    result = {}
    for each in found:
        one = [b / s for b, s in zip(base.seconds, each.seconds, strict=True)]
        result[each.name] = {"each": one, "median": statistics.median(one), "min": min(one), "max": max(one)}
    return result


def record(found: Sequence[Contender], besides: Sequence[str]) -> dict[str, Any]:
    return {
        "seconds": {each.name: each.seconds for each in found},
        "bytes": {each.name: each.size // max(1, len(each.calls)) for each in found},
        "ratio": {f"to {beside}": ratios(found, beside) for beside in besides},
    }


def show(title: str, found: Sequence[Contender], besides: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    table.add_column("")
    for head in ("ms", "MB", *(f"times as fast as {b}" for b in besides), "asked for"):
        table.add_column(head, justify="right")
    by_beside = {beside: ratios(found, beside) for beside in besides}
    for each in found:
        cells = [f"{statistics.median(each.seconds) * 1e3:.3f}", f"{each.size / max(1, len(each.calls)) / 1e6:.1f}"]
        for beside in besides:
            one = by_beside[beside].get(each.name)
            cells.append(f"{one['median']:.2f} ({one['min']:.2f}-{one['max']:.2f})" if one else "")
        wanted = "; ".join(f"{least:g} x {beside}" for beside, least in WANTED.get(each.name, ()))
        table.add_row(each.name, *cells, wanted)
    Console(width=150).print(table)


def show_crossover(found: dict[str, dict[str, list[float]]]) -> None:
    for name, ways in found.items():
        said = ", ".join(f"{way} {statistics.median(seconds) * 1e3:.3f} ms" for way, seconds in ways.items())
        print(f"{name}: {said}")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"warning: other processes are busy (load {load:.1f}); figures will be off", file=sys.stderr)
    if best_level() < 0:
        print("error: posttrain was built without its CPU kernels; there is nothing to measure", file=sys.stderr)
        return 1
    level = options.level or LEVELS[best_level()]
    torch.manual_seed(0)
    clock = CLOCKS[options.clock]
    results: dict[str, Any] = {}
    with threads(options.threads), forced(level), torch.no_grad():
        for title, streamed in (("resident", 0), ("streamed", options.stream << 20)):
            if title in options.parts:
                found = one_row(streamed, options.repetitions, options.seconds, clock)
                show(f"One row by {SIZE} x {SIZE}, {title}", found, (BF16, INT8))
                results[title] = record(found, (BF16, INT8))
        if "crossover" in options.parts:
            results["crossover"] = crossover(options.repetitions, options.seconds, clock)
            show_crossover(results["crossover"])
        if "decoding" in options.parts:
            found = decoding(options.repetitions, options.tokens, clock)
            show("A token of a model of 1.1 B parameters", found, ("decoding, bf16",))
            results["decoding"] = record(found, ("decoding, bf16",))
    document = {
        "date": time.strftime("%Y-%m-%d"), "hardware": hardware(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in ("posttrain", "torch")},
        "settings": {
            "level": level, "threads": options.threads, "repetitions": options.repetitions, "load_before": load,
            "stream_mib": options.stream, "clock": options.clock,
        },
        **results,
    }  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(rounded(document), indent=1) + "\n", encoding="utf-8")
    print(f"written: {options.json.name}", file=sys.stderr)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parts = ("resident", "streamed", "crossover", "decoding")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description="Kernels beside torch's.")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--repetitions", type=int, default=9, help="how often all take turns (default 9)")
    parser.add_argument("--seconds", type=float, default=0.1, help="of a contender's turn, at least (default 0.1)")
    parser.add_argument(
        "--stream", type=int, default=384, help="MiB of copies, more than the caches hold (default 384)"
    )
    parser.add_argument("--tokens", type=int, default=8, help="decoded in a turn (default 8)")
    parser.add_argument("--threads", type=int, default=1, help="of each side (default 1)")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="thread: with other work beside it")
    parser.add_argument("--level", choices=LEVELS, help="of the processor (default: the highest it offers)")
    parser.add_argument("--quick", action="store_true", help="two short repetitions: does it run?")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "kernels.json", metavar="PATH")
    options = parser.parse_args(arguments)
    if options.quick:
        options.repetitions, options.seconds, options.tokens, options.stream = 2, 0.02, 2, 64
    return options


if __name__ == "__main__":
    sys.exit(main())
