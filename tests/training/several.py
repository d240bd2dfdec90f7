"""Trainings by several processes for tests: `python several.py JOBS` in each of them, in the environment that a
launcher makes, carries out a list of jobs (JSON) one after the other; `carry_out` does one in this process.

A job: `kind` (see KINDS), `shard`, `folder` for checkpoints, `after` how many steps it stops, `out` where metrics and
weights go (each process writes its own). One with a `recipe` is a whole run in `folder`; one that `saves` writes a
model in each process, below that folder.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import save_file

from posttrain import methods
from posttrain.models.adapters import add_lora
from posttrain.models.causal import CausalPolicy
from posttrain.models.float_format import FloatFormat
from posttrain.models.simulated import SimulatedPrecision
from posttrain.objective.divergence import FullKL
from posttrain.training.loop import Trainer
from posttrain.training.method import Method
from tiny_training import TOKENIZER, demonstrations, feedback, make_policy, offline, online, pairs

# warm-up leaves the first step a rate; a token budget below a step's size makes several micro-batches of it
SMALL: dict[str, Any] = {
    "steps": 4, "batch": 5, "group": 4, "max_tokens": 8, "learning_rate": 1e-3, "schedule": "constant", "warmup": 0.0,
    "token_budget": 48, "checkpoint_every": 0,
}  # fmt: skip
ROWS = {"demonstrations": demonstrations, "preferences": pairs, "feedback": feedback}


def _mixture_of_experts() -> CausalPolicy:
    from tiny_models import make_policy as make

    return make("qwen3-moe", TOKENIZER, vocab_size=259, max_position_embeddings=128)


def _adapted() -> CausalPolicy:
    return add_lora(make_policy(), rank=4, seed=1)


def _low() -> CausalPolicy:
    return make_policy(dtype=torch.bfloat16)


# name -> (the method, what makes its policy)
KINDS: dict[str, tuple[Callable[[], Method], Callable[[], CausalPolicy]]] = {
    "sft": (methods.sft, make_policy),
    "dpo": (methods.dpo, make_policy),
    "grpo": (lambda: methods.grpo(beta=0.1).with_settings(updates=2, minibatches=2), make_policy),
    "kto": (methods.kto, make_policy),
    "ppo": (methods.ppo, make_policy),
    "normalised": (lambda: methods.s_ppo(threshold=1e-3).with_settings(updates=2), make_policy),
    "sft-low": (methods.sft, _low),
    "recomputed": (lambda: methods.sft().with_settings(checkpointing=True), make_policy),
    "rounded": (lambda: methods.sft().replace(precision=SimulatedPrecision(FloatFormat(5, 2))), make_policy),
    "dpo-lora": (methods.dpo, _adapted),
    "following": (lambda: methods.dpo().replace(reference_decay=0.5), make_policy),
    "full-kl": (lambda: methods.sft().replace(divergences=(FullKL(0.5),)), make_policy),
    "experts": (lambda: methods.grpo().replace(replay_experts="trainer").with_settings(updates=2), _mixture_of_experts),
}


def trainer_of(job: dict[str, Any]) -> Trainer:
    make_method, make = KINDS[job["kind"]]
    made = make_method()
    method = made.with_settings(**{**SMALL, **_own(made)})
    policy, folder = make(), Path(job["folder"]) if job.get("folder") else None
    if method.online:
        trainer = online(method, policy, folder=folder)
    else:
        trainer = offline(method, ROWS[method.data](), policy, folder=folder)
    trainer.stop = lambda: trainer.progress.step >= job.get("after", 99)
    return trainer


def _own(method: Method) -> dict[str, Any]:
    """The settings that a kind has of its own."""
    own = ("updates", "minibatches", "checkpointing")
    found: dict[str, Any] = {name: getattr(method.settings, name) for name in own}
    return found | ({"learning_rate": 0.01} if method.normaliser is not None else {})


def carry_out(job: dict[str, Any]) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Metrics of each step, and the weights at the end."""
    torch.manual_seed(0)
    trainer = trainer_of(job)
    metrics: list[dict[str, float]] = []
    trainer.tracker.step = lambda step, seconds, values, groups: metrics.append(values)  # type: ignore[method-assign]
    status = trainer.run().status
    assert status == ("interrupted" if job.get("after", 99) < 4 else "finished"), status
    return metrics, {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}


def whole_run(job: dict[str, Any]) -> Any:
    from posttrain.recipe import parse_recipe
    from posttrain.run import execute

    return execute(parse_recipe(job["recipe"]), folder=Path(job["folder"]), resume=True, show=False, shard=job["shard"])


def main(file: str) -> None:
    from posttrain.processes import here, start

    torch.set_num_threads(1)
    for job in json.loads(Path(file).read_text()):
        if "recipe" in job:
            whole_run(job)
            continue
        start(job.get("shard"))
        if "saves" in job:
            make_policy().save(Path(job["saves"]) / str(here().rank))
            continue
        metrics, weights = carry_out(job)
        out = Path(job["out"])
        save_file(weights, out.with_suffix(f".{here().rank}.safetensors"))
        out.with_suffix(f".{here().rank}.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main(sys.argv[1])
