"""GPTQ beside llm-compressor's: perplexity, bits and time of the same layers on the same windows, in turn.

    make bench-quantization                              # makes an environment with llm-compressor first
    python -m benchmarks.quantization --text FILE        # SmolLM2 is calibrated on a text but for its last tenth

Both sides quantize the linear layers in the blocks in fp32, in order of activation with static groups, damping 0.01,
each measurement in a process of its own; perplexity and divergence from the float model are measured by ours, of the
weights that each side computes with, on text that neither has seen. Only a quiet machine gives times that mean
something.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.child import ROOT, BenchmarkError, answer, high_water
from benchmarks.run import hardware, rounded

RESULT = ROOT / "benchmarks" / "results" / "quantization.json"
MODELS = {"smollm2-135m": 64, "lab:mixed": 128}  # columns that share a scale: 128 does not divide SmolLM2's 576
ZEROS = ("integer", "none")
SAMPLES, LENGTH = 64, 512
WITHIN = 1.005  # of the other's perplexity


def prepare(model: str, text: str | None, folder: Path) -> None:
    """A float model as a folder in fp32, and calibration windows as rows of tokens."""
    from safetensors.torch import save_file

    from posttrain.compress.method import Calibrated
    from posttrain.models.load import load
    from posttrain.studies.compression import texts_for

    policy = load(model, precision="fp32")
    policy.save(folder / "float")
    batches = texts_for(policy, text).batches(policy, Calibrated(SAMPLES, LENGTH), seed=0)
    save_file({f"{i:04}": batch["input_ids"] for i, batch in enumerate(batches)}, folder / "windows.safetensors")


def ours(folder: Path, bits: int, group: int, zero: Any, output: Path) -> dict[str, float]:
    """The seconds of our quantization, its bits a weight, and the weights that it computes with as a file."""
    from safetensors.torch import load_file, save_file

    from posttrain import methods
    from posttrain.compress.packed.linear import PackedLinear
    from posttrain.compress.policy import compressed_copy
    from posttrain.models.load import load

    policy = load(folder / "float", precision="fp32")
    rows = load_file(folder / "windows.safetensors")
    batches = [{"input_ids": part, "use_cache": False} for _, part in sorted(rows.items())]
    begun = time.perf_counter()
    small = compressed_copy(policy, methods.gptq(bits, group, zero, act_order=True), batches)
    seconds = time.perf_counter() - begun
    save_file(
        {
            f"{name}.weight": module.weight.dequantize().float().contiguous()
            for name, module in small.base.named_modules()
            if isinstance(module, PackedLinear)
        },
        output,
    )
    return {"seconds": seconds, "bits": small.compression.bits}


def judge(model: str, text: str | None, folder: Path, weights: Path) -> dict[str, float]:
    """Perplexity of the float model and of one with these weights, and the divergence of the second."""
    import torch
    from safetensors.torch import load_file

    from posttrain.evaluation.perplexity import predict
    from posttrain.models.load import load
    from posttrain.studies.compression import texts_for

    whole, small = load(model, precision="fp32"), load(folder / "float", precision="fp32")
    named = dict(small.base.named_parameters())
    with torch.no_grad():
        for name, weight in load_file(weights).items():
            named[name].copy_(weight)
    found = predict(small, texts_for(whole, text).unseen(whole, LENGTH), of=whole)
    assert found.other is not None
    return {"perplexity": found.perplexity, "float": found.other.perplexity, "kl": found.divergence}


def in_turn(model: str, group: int, zero: str, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both sides `--repetitions` times in turn, and what is left of the model."""
    weights = {side: folder / f"{side}-{zero}.safetensors" for side in ("ours", "llm-compressor")}
    times: dict[str, list[dict[str, float]]] = {side: [] for side in weights}
    for _ in range(given.repetitions):
        for side, output in weights.items():
            if side == "ours":
                command = [sys.executable, "-m", "benchmarks.quantization", "--worker", str(folder), str(output)]
                command += [str(given.bits), str(group), zero]
            else:
                command = [given.peer_python, "-m", "benchmarks.llm_compressor", str(folder / "float")]
                command += [str(folder / "windows.safetensors"), str(output), str(given.bits), str(group), zero]
            times[side].append(answer(command, f"{model} by {side}"))
            print(f"{time.strftime('%H:%M:%S')} {model} {zero} {side}: {times[side][-1]}", file=sys.stderr, flush=True)
    found: dict[str, Any] = {"group": group, "zero": zero, "sides": {}}
    for side, output in weights.items():
        found["sides"][side] = judge(model, given.text, folder, output) | {
            "seconds": statistics.median(t["seconds"] for t in times[side]),
            "peak_mib": max(t["peak_mib"] for t in times[side]),
        }
    found["bits"] = times["ours"][0]["bits"]
    each = [b["seconds"] / a["seconds"] for a, b in zip(*times.values(), strict=True)]
    found["faster"] = [statistics.median(each), min(each), max(each)]
    return found


def worker(folder: str, output: str, bits: str, group: str, zero: str) -> None:
    found = ours(Path(folder), int(bits), int(group), zero, Path(output))
    found["peak_mib"] = high_water() / 2**20
    print(json.dumps(found), flush=True)


def show(found: dict[str, list[dict[str, Any]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=r"GPTQ beside llm-compressor's; how many times faster \[least, most]", title_justify="left")
    for column in ("model", "group", "zero", "side", "perplexity", "float", "KL", "s", "faster", "peak MiB"):
        table.add_column(column, no_wrap=True)
    for model, entries in found.items():
        for entry in entries:
            middle, least, most = entry["faster"]
            for side, of in entry["sides"].items():
                faster = rf"{middle:.2f} \[{least:.2f}, {most:.2f}]" if side == "ours" else ""
                figures = (f"{of['perplexity']:.4g}", f"{of['float']:.4g}", f"{of['kl']:.4f}", f"{of['seconds']:.1f}")
                table.add_row(
                    model, str(entry["group"]), entry["zero"], side, *figures, faster, f"{of['peak_mib']:,.0f}"
                )
    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(table)
    for model, entries in found.items():
        for entry in entries:
            mine, other = (of["perplexity"] for of in entry["sides"].values())
            met = "no worse than" if mine <= WITHIN * other else "WORSE than"
            console.print(f"{model}, zero {entry['zero']}: {met} llm-compressor's within 0.5 %", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization", description="GPTQ beside a peer's.")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--zeros", nargs="+", choices=ZEROS, default=ZEROS, help="zero points")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--text", help="a file of text; by default text that the lab makes")
    parser.add_argument("--peer-python", default=str(ROOT / ".venv-llmcompressor" / "bin" / "python"), metavar="PATH")
    parser.add_argument("--json", type=Path, default=RESULT, help="where the figures go")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(*given.worker)
        return 0
    if not Path(given.peer_python).is_file():
        print(f"error: no Python at {given.peer_python}; make an environment with `pip install llmcompressor` and "
              f"name its Python by --peer-python", file=sys.stderr)  # fmt: skip
        return 1
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        for model in given.models:
            with tempfile.TemporaryDirectory() as place:
                text = None if model.startswith("lab:") else given.text
                prepare(model, text, Path(place))
                found[model] = [in_turn(model, MODELS[model], zero, given, Path(place)) for zero in given.zeros]
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(found)
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "bits": given.bits,
        "text": given.text is not None,
    }
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(rounded(about | {"models": found}), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
