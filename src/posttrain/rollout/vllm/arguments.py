"""What vLLM is started with, in process and as a server alike."""

from __future__ import annotations

import json
from typing import Any

from posttrain.rollout.vllm.transfer import BACKEND

CACHE_BYTES = 2 << 30  # key-value memory on CPUs, where vLLM would otherwise take nearly all that there is


def engine_arguments(dtype: str, rows: int, max_length: int, options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of vLLM's engine. options: the user's, which win.

    Log-probabilities are asked for as sampled (temperature and truncation included). Defaults of sampling that come
    with a model are left out: what is drawn is what the recipe says.
    """
    from vllm.platforms import current_platform

    found: dict[str, Any] = {
        "dtype": dtype,
        "max_num_seqs": rows,
        "max_model_len": max_length,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "weight_transfer_config": {"backend": BACKEND},
        "seed": 0,
    }
    if current_platform.is_cpu():
        # a compiled model holds on to the packed weights it was compiled with, and would never see others
        found |= {"enforce_eager": True, "kv_cache_memory_bytes": CACHE_BYTES}
    return found | options


def as_flags(arguments: dict[str, Any]) -> list[str]:
    """The same for a command line."""
    flags: list[str] = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags += [f"--{flag}", value if isinstance(value, str) else json.dumps(value)]
    return flags
