"""LoRA adapters, by peft."""

from __future__ import annotations

import re
from typing import Any

from posttrain.models.causal import CausalPolicy
from posttrain.trajectory import PosttrainError


def add_lora(
    policy: CausalPolicy,
    *,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: list[str] | str = "all-linear",
    seed: int = 0,
) -> CausalPolicy:
    r"""Wrap the model with a low-rank adapter; only its matrices are trained.

    The layers are wrapped in place, so use the policy returned and no longer the one given.

    .. math:: W' = W + \frac{\alpha}{r} B A

    Args:
        rank: r. alpha: scale (default 2 r). dropout: on the adapter's input.
        target_modules: names of linear layers, or `all-linear` for all but the vocabulary projection.
    Reference: LoRA, 2021, arXiv 2106.09685.
    """
    import torch
    from peft import LoraConfig, TaskType, get_peft_model

    if policy.adapted:
        raise PosttrainError("the model already has an adapter; merge it first (policy.merged())")
    policy.trainable_parameters()  # a compressed model says that it has none
    projection = policy.model.get_output_embeddings()
    if any(m is projection and _names(target_modules, n) for n, m in policy.model.named_modules()):
        raise PosttrainError(
            "LoRA: target_modules name the vocabulary projection, which stays as it is (the fused log-probabilities "
            "read its one matrix); leave it out, as all-linear does"
        )
    settings: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha if alpha is not None else 2 * rank,
        "lora_dropout": dropout,
        "target_modules": target_modules,
        "task_type": TaskType.CAUSAL_LM,
    }
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            wrapped = get_peft_model(policy.model, LoraConfig(**settings), autocast_adapter_dtype=False)
    except ValueError as error:
        raise PosttrainError(f"LoRA: {error}") from error
    adapted = CausalPolicy(wrapped, policy.tokenizer, policy.name)
    adapted._packs = policy._packs
    return adapted


def _names(target_modules: list[str] | str, name: str) -> bool:
    """Whether peft's `target_modules` (a pattern, or the ends of names) mean a module."""
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in target_modules)
