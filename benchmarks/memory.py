"""Predicted beside measured: peak memory and time of training steps, by `posttrain plan` and by a process that trains.

    python -m benchmarks.memory                          # three models by three methods, about five minutes
    python -m benchmarks.memory --models qwen-26m --methods grpo

Each measurement is a process of its own that trains two steps on random tokens. What it holds before its model is there
(Python, the libraries that training imports, a tokenizer) is its baseline, taken after the same steps with a model of
next to no size; measured is the largest resident set (VmHWM) minus that. Predicted is the plan's peak without the
process, from the configuration alone. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.child import high_water

RESULTS = Path(__file__).parent / "results" / "memory.json"
TOLERANCE = 0.2
STEPS = 2  # the moments are there from the second on
BUDGET = 512  # model tokens of a micro-batch, so that a step has two

# what differs from a family's defaults; a name alone is a bundled model
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2-135m": ("", {}),
    "llama-59m": (  # five sixths of its parameters are the vocabulary's
        "Llama",
        {"vocab_size": 128256, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6,
         "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "qwen-26m": (  # deep and narrow, normed queries and keys, a vocabulary matrix of its own
        "Qwen3",
        {"vocab_size": 32768, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 12,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": False},
    ),
}  # fmt: skip

TINY = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Work:
    """A step: rows or prompts, tokens of each prompt and completion, completions a prompt (online)."""

    batch: int
    prompt: int
    completion: int
    group: int = 1


METHODS = {
    "sft": Work(batch=4, prompt=64, completion=192),
    "dpo": Work(batch=2, prompt=96, completion=96),
    "grpo": Work(batch=2, prompt=64, completion=32, group=8),
}


def method_of(name: str) -> Any:
    """The method with the settings of its measurement."""
    from posttrain.methods.registry import find

    work = METHODS[name]
    settings: dict[str, Any] = {"batch": work.batch, "steps": STEPS, "token_budget": BUDGET}
    if work.group > 1:
        settings |= {"group": work.group, "max_tokens": work.completion}
    return find(name).stages[0].with_settings(**settings)


def config_of(model: str) -> Any:
    """The configuration of one of `MODELS`."""
    import transformers

    from posttrain.plan.outline import read_config

    family, differing = MODELS[model]
    return getattr(transformers, f"{family}Config")(**differing) if family else read_config(model)


# -- one measurement, in a process of its own ------------------------------------------------------------------------


def measure(model: str, name: str) -> dict[str, Any]:
    """Train and say what it took: bytes of the baseline and beyond it, seconds of the last step."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from posttrain.models.allocator import keep_freed_memory
    from posttrain.models.causal import CausalPolicy
    from posttrain.models.load import best_dtype, bundled_folder, load
    from posttrain.plan.device import resident

    transformers.utils.logging.disable_progress_bar()
    keep_freed_memory()
    dtype, family = best_dtype(torch.device("cpu")), MODELS[model][0]
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder("smollm2-135m"))
    torch.manual_seed(0)

    def made(config: Any) -> CausalPolicy:
        return CausalPolicy(AutoModelForCausalLM.from_config(config, dtype=dtype).eval(), tokenizer, model)

    _train(made(getattr(transformers, f"{family or 'Llama'}Config")(**TINY)), name)
    gc.collect()
    baseline = resident()
    seconds, lengths = _train(made(config_of(model)) if family else load(model), name)
    return {
        "baseline": baseline,
        "measured": high_water() - baseline,
        "seconds": seconds,
        "completion_tokens": sum(lengths) / len(lengths),
        "threads": torch.get_num_threads(),
        "precision": str(dtype).removeprefix("torch."),
    }


def _train(policy: Any, name: str) -> tuple[float, list[int]]:
    """Train the steps of a measurement on random tokens; seconds of the last, and the length of every completion."""
    import torch

    from benchmarks.ours import InOrder, Stopwatch
    from posttrain.reward.reward import Reward
    from posttrain.rollout.embedded import EmbeddedEngine
    from posttrain.training.collect import Offline, Online, Source
    from posttrain.training.loop import Trainer
    from posttrain.trajectory import Group, Label, Prompt, Trajectory

    work, method = METHODS[name], method_of(name)
    vocabulary = policy.head().weight.shape[0]

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(10, vocabulary, (count,))

    def group(members: int) -> Group:
        prompt, made = tokens(work.prompt), []
        labels: list[Label] = ["chosen", "rejected"] if members == 2 else ["none"]
        for label in labels:
            whole = torch.cat([prompt, tokens(work.completion)])
            one = Trajectory(whole, torch.arange(len(whole)) >= work.prompt)
            one.label = label
            made.append(one)
        return Group(made)

    source: Source
    if method.online:
        prompts = [Prompt(tokens(work.prompt), key=i) for i in range(STEPS * work.batch)]
        engine = EmbeddedEngine(policy, rows=method.settings.rollout_rows)
        reward = Reward({"characters": (_reward, 1.0)})
        source = Online(prompts, InOrder(prompts), method.settings, engine, reward, seed=0)
    else:
        groups = [group(2 if method.data == "preferences" else 1) for _ in range(STEPS * work.batch)]
        source = Offline(groups, InOrder(groups), method.settings)
    watch = Stopwatch()
    Trainer(policy, method, source, tracker=watch).run()
    lengths = [length for step in watch.done for _, parts in step.groups for length in parts]
    return watch.done[-1].ended - watch.done[-2].ended, lengths


def _reward(completion: str, prompt: Any) -> float:
    return float(sum(map(ord, completion)) % 97)


# -- all of them -----------------------------------------------------------------------------------------------------


def predict(model: str, name: str, device: Any) -> dict[str, Any]:
    """Bytes beyond the process, by part, and seconds of a step, from the configuration alone."""
    import torch

    from posttrain.models.load import best_dtype
    from posttrain.plan.planner import Planner
    from posttrain.plan.rehearsal import Lengths

    work = METHODS[name]
    planner = Planner(
        config_of(model), method_of(name), Lengths(work.prompt, work.completion), device,
        best_dtype(torch.device("cpu")), name=model,
    )  # fmt: skip
    setting = planner.setting({}, 1)
    made = setting.rehearsal
    return {
        "predicted": made.peak.bytes,
        "parts": made.peak.parts,
        "phases": {phase: peak.bytes for phase, peak in made.phases.items()},
        "predicted_seconds": sum(setting.seconds.values()),
    }


def _run(model: str, name: str) -> dict[str, Any]:
    """One measurement by a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--one", model, name]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="predict anew beside what the JSON file has measured")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return 0

    from rich.console import Console
    from rich.table import Table

    from posttrain.plan.device import this_machine

    device, found = this_machine(), list[dict[str, Any]]()
    before = json.loads(options.json.read_text(encoding="utf-8")) if options.again else []
    kept = {(row["model"], row["method"]): row for row in before}
    for model, name in product(options.models, options.methods):
        print(f"{model}, {name} ...", file=sys.stderr, flush=True)
        figures = kept[model, name] if options.again else _run(model, name)
        figures |= predict(model, name, device)
        ratio = figures["predicted"] / figures["measured"]
        found.append({"model": model, "method": name, **figures, "ratio": ratio})
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    table = Table(title="Peak memory beyond the process, MiB; seconds a step", title_justify="left")
    for heading in ("model", "method", "predicted", "measured", "ratio", "s predicted", "s measured"):
        table.add_column(heading, justify="left" if heading in ("model", "method") else "right")
    for row in found:
        table.add_row(
            row["model"], row["method"], f"{row['predicted'] / 2**20:,.0f}", f"{row['measured'] / 2**20:,.0f}",
            f"{row['ratio']:.2f}", f"{row['predicted_seconds']:.2f}", f"{row['seconds']:.2f}",
        )  # fmt: skip
    Console().print(table)
    worst = max(abs(row["ratio"] - 1) for row in found)
    print(f"largest error {worst:.0%}, wanted within {TOLERANCE:.0%}: {'met' if worst <= TOLERANCE else 'missed'}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
