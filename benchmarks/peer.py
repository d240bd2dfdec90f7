"""TRL's side of a measurement: its trainers with the settings that suit them on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from benchmarks import workload
from benchmarks.measurement import Arm, Step
from benchmarks.roofline import Group
from benchmarks.workload import Case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Stopwatch(TrainerCallback):
    """Notes when each step ended."""

    def __init__(self) -> None:
        self.ended: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ended.append(time.perf_counter())


class Rewards:
    """The reward, and a note of the completions it was asked about; TRL calls it once a step with all of them."""

    __name__ = "near"

    def __init__(self, prompt_tokens: Callable[[Any], int], group: int) -> None:
        self.prompt_tokens, self.group = prompt_tokens, group
        self.groups: list[list[Group]] = []
        self.rewards: list[list[float]] = []

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], answer: list[int], **_: Any
    ) -> list[float]:
        scores = [workload.reward(c[0]["content"], a) for c, a in zip(completions, answer, strict=True)]
        lengths = [len(ids) for ids in completion_ids]
        starts = range(0, len(prompts), self.group)
        self.groups.append([(self.prompt_tokens(prompts[i]), lengths[i : i + self.group]) for i in starts])
        self.rewards.append(scores)
        return scores


class Collator:
    """The trainer's own collator, with a note of the sequences that went through it."""

    def __init__(self, inner: Callable[[list[Any]], dict[str, Any]], shapes: Callable[[dict[str, Any]], list[Group]]):
        self.inner, self.shapes = inner, shapes
        self.groups: list[list[Group]] = []

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        batch = self.inner(examples)
        self.groups.append(self.shapes(batch))
        return batch


def run(case: Case, steps: int, folder: Path, arm: Arm, scratch: Path) -> tuple[list[Step], float]:
    """Train `steps` steps; returns them, and the loss of the first."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[arm.weights])
    rows = Dataset.from_list(workload.rows_of(case, steps))
    watch = Stopwatch()
    options = _options(case, steps, arm, scratch)
    wiring: dict[str, Any] = {"model": model, "train_dataset": rows, "processing_class": tokenizer}
    wiring["callbacks"] = [watch]
    if case.lora:
        shape: dict[str, Any] = {
            "r": case.lora,
            "lora_alpha": 2 * case.lora,
            "lora_dropout": 0.0,
            "target_modules": "all-linear",
        }
        wiring["peft_config"] = LoraConfig(task_type=TaskType.CAUSAL_LM, **shape)
    trainer: Any
    if case.online:
        rewards = Rewards(_prompt_counter(tokenizer), case.group)
        scorer: Any = rewards
        trainer = GRPOTrainer(args=_grpo(case, arm, options), reward_funcs=scorer, **wiring)
        trainer.train()
        noted, earned = rewards.groups, rewards.rewards
    else:
        if case.method == "sft":
            trainer = SFTTrainer(args=SFTConfig(**options, max_length=None), **wiring)
        else:
            trainer = DPOTrainer(args=DPOConfig(**options, max_length=None), **wiring)
        noting = Collator(trainer.data_collator, _demonstrations if case.method == "sft" else _pairs)
        trainer.data_collator = noting
        trainer.train()
        pieces = noting.groups
        noted = [list(chain(*pieces[i : i + arm.pieces])) for i in range(0, len(pieces), arm.pieces)]
        earned = [[] for _ in noted]
    each = zip(watch.ended, noted, earned, strict=True)
    return [Step(*step) for step in each], float(trainer.state.log_history[0]["loss"])


def _options(case: Case, steps: int, arm: Arm, scratch: Path) -> dict[str, Any]:
    """What all trainers share. Nothing is saved or reported; the first step alone is logged, for its loss."""
    batch = case.sequences if case.online else case.batch
    return {
        "output_dir": str(scratch),
        "use_cpu": True,
        "bf16": True,
        "per_device_train_batch_size": batch // arm.pieces,
        "gradient_accumulation_steps": arm.pieces,
        "gradient_checkpointing": arm.checkpointing,
        "max_steps": steps,
        "learning_rate": case.learning_rate,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": [],
        "logging_steps": 1_000_000,
        "logging_first_step": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def _grpo(case: Case, arm: Arm, options: dict[str, Any]) -> GRPOConfig:
    return GRPOConfig(
        **options,
        num_generations=case.group,
        max_completion_length=case.max_tokens,
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
        shuffle_dataset=False,
        use_transformers_continuous_batching=arm.paged,
    )


def _prompt_counter(tokenizer: PreTrainedTokenizerBase) -> Callable[[Any], int]:
    def count(prompt: Any) -> int:
        text = str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
        return len(tokenizer.encode(text, add_special_tokens=False))

    return count


def _demonstrations(batch: dict[str, Any]) -> list[Group]:
    """Sequences of an SFT batch: the completion starts at the first label."""
    lengths = batch["attention_mask"].sum(1).tolist()
    prompts = (batch["labels"] != -100).int().argmax(1).tolist()
    return [(prompt, [length - prompt]) for prompt, length in zip(prompts, lengths, strict=True)]


def _pairs(batch: dict[str, Any]) -> list[Group]:
    """Sequences of a DPO batch: all chosen ones, then all rejected ones."""
    lengths = batch["attention_mask"].sum(1).tolist()
    prompts = batch["completion_mask"].argmax(1).tolist()
    half = len(lengths) // 2
    return [(prompts[i], [lengths[i] - prompts[i], lengths[half + i] - prompts[half + i]]) for i in range(half)]
