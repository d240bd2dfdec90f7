"""Both sides of `benchmarks.gpu`: training steps of ours and of TRL, completions of ours and of `transformers`.

Both run in this process, one after the other; the clock is read when the device has done what it was given.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from benchmarks.gpu_work import Row, Work, reward
from benchmarks.roofline import Group


@dataclass(slots=True)
class Measured:
    """seconds: of each timed step or call; groups: of each, tokens of prompts and completions; peak_mib: of the
    device's memory, as torch allocated it; about: whatever else is worth knowing.
    """

    seconds: list[float]
    groups: list[list[Group]]
    peak_mib: float
    about: dict[str, Any] = field(default_factory=dict)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def fresh(device: torch.device) -> None:
    """Give back what an earlier measurement held, and count the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_mib(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0.0


# Training


def ours(kind: Any, work: Work, warmup: int, steps: int, budget: int) -> Measured:
    """Steps of posttrain with a GPU's settings: more tokens at a time (`budget`), all completions at once."""
    from benchmarks.ours import InOrder, Stopwatch
    from posttrain import methods
    from posttrain.data.dataset import load_dataset
    from posttrain.models.causal import CausalPolicy
    from posttrain.reward.reward import Reward
    from posttrain.rollout.embedded import EmbeddedEngine
    from posttrain.training.collect import Offline, Online, Source
    from posttrain.training.loop import Trainer

    class Watch(Stopwatch):
        def step(self, step: int, seconds: float, metrics: dict[str, float], groups: Sequence[Any]) -> None:
            wait(work.device)
            super().step(step, seconds, metrics, groups)
            rollouts.append(metrics.get("rollout_seconds", 0.0))

    fresh(work.device)
    load, rollouts = work.load, list[float]()
    settings: dict[str, Any] = {
        "steps": warmup + steps, "learning_rate": 1e-6, "schedule": "constant", "warmup": 0.0,
        "token_budget": budget, "checkpoint_every": 0, "batch": batch_of(kind, work),
    }  # fmt: skip
    if kind == "grpo":
        settings |= {"group": load.group, "max_tokens": load.tokens, "rollout_rows": load.prompts * load.group}
    method = getattr(methods, kind)().with_settings(**settings)
    policy = CausalPolicy(work.model(), work.tokenizer, "random")
    data = load_dataset(work.rows(kind, settings["batch"] * (warmup + steps)), work.tokenizer)
    source: Source
    if kind == "grpo":
        engine = EmbeddedEngine(policy, rows=settings["rollout_rows"])
        scored = Reward({"text": (lambda completion, prompt: reward(completion), 1.0)})
        source = Online(data.prompts, InOrder(data), method.settings, engine, scored, seed=0)
    else:
        source = Offline(data.groups, InOrder(data), method.settings)
    watch = Watch()
    Trainer(policy, method, source, tracker=watch).run()
    times = [s.ended for s in watch.done[warmup - 1 :]]
    about = {"loss": watch.losses[0], "rollout_seconds": rollouts[warmup:], "arm": f"{budget} tokens at a time"}
    groups = [s.groups for s in watch.done[warmup:]]
    return Measured([after - before for before, after in pairwise(times)], groups, peak_mib(work.device), about)


def batch_of(kind: str, work: Work) -> int:
    """Rows, pairs or prompts of a step."""
    return {"sft": work.load.rows, "dpo": work.load.pairs, "grpo": work.load.prompts}[kind]


@dataclass(frozen=True, slots=True)
class Arm:
    """A way to run TRL: micro-batches of a step, and whether layers are computed again in the backward pass."""

    pieces: int = 1
    checkpointing: bool = False

    def __str__(self) -> str:
        cut = f"{self.pieces} micro-batches" if self.pieces > 1 else "at once"
        return cut + (", checkpointing" if self.checkpointing else "")


def arms(kind: str, work: Work) -> list[Arm]:
    """From the fastest to the most frugal; the first that fits the memory is taken."""
    first = work.load.pieces if kind == "grpo" else 1
    return [Arm(first), Arm(2 * first), Arm(4 * first), Arm(4 * first, checkpointing=True)]


def trl(kind: Any, work: Work, warmup: int, steps: int, arm: Arm) -> Measured:
    """Steps of TRL in bf16, weights and moments included, and its own generation by `transformers`."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    from benchmarks.peer import Collator, _demonstrations, _pairs, _prompt_counter

    class Watch(TrainerCallback):
        ended: list[float] = []  # noqa: RUF012 - made anew with the class

        def on_step_end(self, *_: Any, **__: Any) -> None:
            wait(work.device)
            self.ended.append(time.perf_counter())

    fresh(work.device)
    load, batch = work.load, batch_of(kind, work)
    total = batch * (load.group if kind == "grpo" else 1)
    rows: list[Row] = work.rows(kind, batch * (warmup + steps))
    with tempfile.TemporaryDirectory() as scratch:
        options: dict[str, Any] = {
            "output_dir": scratch, "use_cpu": work.device.type == "cpu", "bf16": work.dtype == torch.bfloat16,
            "per_device_train_batch_size": total // arm.pieces, "gradient_accumulation_steps": arm.pieces,
            "gradient_checkpointing": arm.checkpointing, "max_steps": warmup + steps, "learning_rate": 1e-6,
            "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", "save_strategy": "no",
            "report_to": [], "logging_steps": 1_000_000, "logging_first_step": True, "disable_tqdm": True,
        }  # fmt: skip
        wiring: dict[str, Any] = {
            "model": work.model(), "train_dataset": Dataset.from_list(rows), "processing_class": work.tokenizer,
            "callbacks": [Watch()],
        }  # fmt: skip
        noted: list[list[Group]] = []
        trainer: Any
        if kind == "grpo":
            count = _prompt_counter(work.tokenizer)

            def scored(prompts: Any, completions: Any, completion_ids: Any, **_: Any) -> list[float]:
                lengths, starts = [len(ids) for ids in completion_ids], range(0, len(prompts), load.group)
                noted.append([(count(prompts[i]), lengths[i : i + load.group]) for i in starts])
                return [reward(c[0]["content"]) for c in completions]

            config: Any = GRPOConfig(
                **options, num_generations=load.group, max_completion_length=load.tokens, temperature=1.0, beta=0.0,
                loss_type="grpo", shuffle_dataset=False,
            )  # fmt: skip
            scorer: Any = scored
            trainer = GRPOTrainer(args=config, reward_funcs=scorer, **wiring)
        else:
            made, config = (SFTTrainer, SFTConfig) if kind == "sft" else (DPOTrainer, DPOConfig)
            if kind == "dpo":
                wiring["ref_model"] = work.model()
            trainer = made(args=config(**options, max_length=None), **wiring)
            noting = Collator(trainer.data_collator, _demonstrations if kind == "sft" else _pairs)
            trainer.data_collator = noting
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    if kind != "grpo":
        parts = noting.groups
        noted = [[g for part in parts[i : i + arm.pieces] for g in part] for i in range(0, len(parts), arm.pieces)]
    times = Watch.ended[warmup - 1 :]
    return Measured(
        [after - before for before, after in pairwise(times)], noted[warmup:], peak_mib(work.device),
        {"loss": float(trainer.state.log_history[0]["loss"]), "arm": str(arm)},
    )  # fmt: skip


def that_fits(measure: Callable[[Any], Measured], tried: list[Any]) -> Measured:
    """What the first of some arms gives that fits the memory; those that do not are dropped from the list."""
    while True:
        try:
            return measure(tried[0])
        except torch.cuda.OutOfMemoryError:
            if len(tried) == 1:
                raise
            tried.pop(0)


# Generation


def generation(work: Work, prompts: int, samples: int) -> dict[str, Callable[[], Measured]]:
    """Calls that draw `samples` completions of each prompt, by either side, from one model."""
    from posttrain.models.causal import CausalPolicy
    from posttrain.rollout.embedded import EmbeddedEngine
    from posttrain.trajectory import Prompt, Sampling

    fresh(work.device)
    load, model = work.load, work.model()
    ids = work.prompts(prompts, load.prompt.mean)
    policy = CausalPolicy(model, work.tokenizer, "random")
    engine = EmbeddedEngine(policy, rows=prompts * samples)
    asked = [Prompt(torch.tensor(tokens), key=i) for i, tokens in enumerate(ids)]
    given = torch.tensor(ids, device=work.device)
    options: dict[str, Any] = {
        "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": load.tokens,
        "num_return_sequences": samples, "pad_token_id": 0,
    }  # fmt: skip

    def timed(call: Callable[[], list[list[int]]]) -> Measured:
        wait(work.device)
        if work.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        lengths = call()
        wait(work.device)
        taken = time.perf_counter() - begun
        return Measured([taken], [[(load.prompt.mean, row) for row in lengths]], peak_mib(work.device))

    def by_ours() -> list[list[int]]:
        found = engine.generate(asked, samples, Sampling(max_tokens=load.tokens), seed=0)
        return [[len(c.tokens) for c in row] for row in found]

    def by_transformers() -> list[list[int]]:
        with torch.inference_mode():
            found = model.generate(given, attention_mask=torch.ones_like(given), **options)[:, given.shape[1] :].cpu()
        ended = found == 2
        first = torch.where(ended.any(1), ended.int().argmax(1) + 1, found.shape[1])
        lengths: list[list[int]] = first.view(prompts, samples).tolist()
        return lengths

    return {"ours": lambda: timed(by_ours), "transformers": lambda: timed(by_transformers)}
